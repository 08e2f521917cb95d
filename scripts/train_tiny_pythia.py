"""Trains the small GPT-NeoX checkpoint that ships in hf_fusion/tiny_pythia.

    python scripts/train_tiny_pythia.py --out hf_fusion/tiny_pythia

The data is the English text of Python's own `pydoc_data.topics`, so nothing is downloaded. Whole
topics are held out; a paragraph that occurs in them, or twice elsewhere, is left out of the
training part, because the topics quote each other. The tokenizer is a byte-level BPE trained on the
training part only. The model has the shape of a Pythia: parallel residual, rotary embedding over a
quarter of each head, separate output head, exact GELU. Weights are saved in fp16, as Pythia's are.
The same seed, Python, torch, CPU and thread count give the same checkpoint.
"""

import argparse
import math
import pydoc_data.topics
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 2048
CONTEXT = 512
BATCH = 4
HELDOUT_SHARE = 0.11  # of the characters; about 12,000 tokens, 23 windows of CONTEXT
# On the two residual branches while training; the saved configuration has none, as Pythia. None on
# the attention weights: that takes scaled_dot_product_attention off its fused path and costs 0.28 s
# of a 0.51 s step (2 cores, AVX-512).
DROPOUT = 0.2
PEAK_RATE = 1.5e-3
EVALUATE_EVERY = 100  # steps
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"

CARD = """# Tiny Pythia

A GPT-NeoX language model with {parameters:,} parameters for demonstrations and tests: {layers}
layers, hidden size {hidden}, {heads} heads of {head_size}, context {context}, vocabulary
{vocabulary} (byte-level BPE), saved in fp16.

- Data: the documentation text of `pydoc_data.topics` in Python {python}; {train_tokens:,} tokens to
  train on, {heldout_tokens:,} held out in `heldout.txt`, whole topics:
  {topics}.
  Paragraphs that other topics share with these are not in the training part.
- Held-out perplexity: {perplexity:.2f} per token, {bits:.3f} bits per byte (fp32 arithmetic on the
  saved fp16 weights, windows of {context} tokens without overlap). The weights are those of step
  {step} of {steps}, where it was lowest: the number is that of early stopping on this text.
- Command: `python scripts/train_tiny_pythia.py --steps {steps} --seed {seed}`
  (torch {torch}, {threads} threads, {minutes:.0f} minutes).
- Licence: the text and `heldout.txt` are part of Python, copyright Python Software Foundation,
  under the PSF License Version 2 (LICENSE in this folder); paragraphs that repeat others are left
  out. The weights and the tokenizer derive from it.

The model continues text in the manner of a reference manual. It knows nothing and is not meant to
be asked.
"""


def split_topics(seed):
    """Returns (training documents, held-out documents as dict name -> text). The held-out topics
    are drawn by `seed` among those of 1,500 to 12,000 characters, so that no one dominates either
    part.
    """
    topics = {name: text.strip() for name, text in pydoc_data.topics.topics.items()}
    names = [name for name, text in sorted(topics.items()) if 1500 <= len(text) <= 12000]
    random.Random(seed).shuffle(names)
    budget = HELDOUT_SHARE * sum(map(len, topics.values()))
    heldout, seen = {}, set()
    for name in names:
        paragraphs = [p for p in topics[name].split("\n\n") if normalised(p) not in seen]
        seen.update(map(normalised, paragraphs))
        heldout[name] = "\n\n".join(paragraphs)
        if sum(map(len, heldout.values())) >= budget:
            break
    training = []
    for name in sorted(topics.keys() - heldout.keys()):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            if normalised(paragraph) not in seen:
                seen.add(normalised(paragraph))
                paragraphs.append(paragraph)
        training.append("\n\n".join(paragraphs))
    return [text for text in training if text], heldout


def normalised(paragraph):
    """Returns the paragraph without differences of indentation and line breaks."""
    return " ".join(paragraph.split())


def train_tokenizer(documents):
    """Returns a byte-level BPE tokenizer with VOCABULARY entries; 0 ends a text, 1 is padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT, PADDING],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(dropout):
    """Returns a GPTNeoXForCausalLM of Pythia's shape with random weights."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            intermediate_size=768,
            hidden_act="gelu",
            max_position_embeddings=CONTEXT,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            hidden_dropout=dropout,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            },
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@torch.no_grad()
def mean_loss(model, tokens):
    """Returns the mean negative log-likelihood in nats per predicted token over windows of CONTEXT
    without overlap; `tokens` is an int64 tensor (count,)."""
    was_training = model.training
    model.eval()
    total = count = 0
    for window in tokens.split(CONTEXT):
        if len(window) > 1:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            total += cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    model.train(was_training)
    return total / count


def parameter_groups(model):
    """Returns AdamW groups: weight decay on matrices, none on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def rate_at(step, steps):
    """Returns the learning rate: linear warm-up over 5 % of the steps, then a cosine down to 5 % of
    the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return PEAK_RATE * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model, tokens, heldout, steps, seed):
    """Trains in place on random windows of `tokens` and leaves the weights of the step with the
    lowest held-out loss. Returns that step. Raises FloatingPointError when the loss is not finite.
    """
    groups = parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    best, best_step, best_state = math.inf, 0, None
    model.train()
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for step in range(steps):
            starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
            batch = torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the training loss is {loss.item()} at step {step}; expected a finite number"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.update()
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
                current = mean_loss(model, heldout)
                bar.write(
                    f"step {step + 1}: training loss {loss.item():.3f}, "
                    f"held-out perplexity {math.exp(current):.2f}",
                    file=sys.stderr,
                )
                if current < best:
                    best, best_step = current, step + 1
                    best_state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_state)
    return best_step


def save(model, tokenizer, heldout, out):
    """Writes weights in fp16, configurations, tokenizer and heldout.txt into the folder `out`."""
    model.config.hidden_dropout = 0.0
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "heldout.txt").write_text(heldout, encoding="utf-8")


def write_card(out, perplexity, facts):
    """Writes README.md into `out`; `facts` holds the remaining fields of CARD."""
    config = AutoModelForCausalLM.from_pretrained(out).config
    (out / "README.md").write_text(
        CARD.format(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            head_size=config.hidden_size // config.num_attention_heads,
            context=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            perplexity=perplexity,
            python=sys.version.split()[0],
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            **facts,
        ),
        encoding="utf-8",
    )


def parse_options():
    """Returns the options of the command line."""
    default_out = Path(__file__).resolve().parent.parent / "hf_fusion" / "tiny_pythia"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=default_out, help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1200,
        help="optimiser steps of 2,048 tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="draws the held-out topics, the weights and the batches (default: 0)",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected at least 1")
    return options


def main():
    """Trains, saves, and prints the perplexity of the saved checkpoint and a greedy sample."""
    options = parse_options()
    torch.manual_seed(options.seed)
    started = time.monotonic()
    training, heldout = split_topics(options.seed)
    text = "\n\n\n".join(heldout.values()) + "\n"
    tokenizer = train_tokenizer(training)
    tokens = torch.tensor(tokenizer(END_OF_TEXT.join(training), verbose=False)["input_ids"])
    heldout_tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    print(
        f"{len(training)} topics with {len(tokens):,} tokens to train on, {len(heldout)} with "
        f"{len(heldout_tokens):,} held out",
        file=sys.stderr,
    )
    model = build_model(DROPOUT)
    step = train(model, tokens, heldout_tokens, options.steps, options.seed)
    save(model, tokenizer, text, options.out)

    saved = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    loss = mean_loss(saved, heldout_tokens)
    write_card(
        options.out,
        math.exp(loss),
        {
            "parameters": saved.num_parameters(),
            "train_tokens": len(tokens),
            "heldout_tokens": len(heldout_tokens),
            "topics": ", ".join(sorted(heldout)),
            "bits": loss * len(heldout_tokens) / len(text.encode()) / math.log(2),
            "step": step,
            "steps": options.steps,
            "seed": options.seed,
            "minutes": (time.monotonic() - started) / 60,
        },
    )
    prompt = tokenizer("The import statement", return_tensors="pt")
    sample = saved.generate(**prompt, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(sample[0]))
    print(
        f"held-out perplexity {math.exp(loss):.2f}, {saved.num_parameters():,} parameters in "
        f"{options.out}"
    )


if __name__ == "__main__":
    main()
