"""An encoder's embeddings: pictures cut into patches without a convolution, a result that takes
their place where nothing else holds them, and what one call therefore keeps in memory.
"""

from __future__ import annotations

import pytest
import torch
from encoders import VISION, encoder_pair, sample
from pairs import assert_same, noted
from test_bad_input import assert_same_outcome, outcome
from twins import ENCODERS

import hf_fusion
from hf_fusion.registry import families
from hf_fusion.report import Reason
from hf_fusion.transform import meter

pytestmark = [
    pytest.mark.reliability(3, "layer and model parity"),
    pytest.mark.usefixtures("one_thread"),
]

# image size, patch size, channels
PICTURES = ((30, 6, 3), ((12, 20), (3, 4), 1), ((14, 7), (7, 7), 5), (9, 1, 2), (5, 5, 3))


def pixels(model, rows: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random pictures of the size that the model's configuration names."""
    size = model.embeddings.patch_embeddings.image_size
    return torch.randn(
        rows, model.config.num_channels, *size, generator=torch.Generator().manual_seed(4)
    ).to(dtype)


def family_file(name: str):
    """The EncoderCalls of a family."""
    return next(f.encoder for f in families() if f.name == name)


@pytest.fixture
def convolutions(monkeypatch) -> list:
    """Shapes of what goes through torch.nn.functional.conv2d."""
    seen, conv2d = [], torch.nn.functional.conv2d
    monkeypatch.setattr(
        torch.nn.functional, "conv2d", lambda x, *rest: (seen.append(x.shape), conv2d(x, *rest))[1]
    )
    return seen


@pytest.mark.parametrize("image, patch, channels", PICTURES, ids=str)
@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_patches(family, image, patch, channels, convolutions, trials):
    sizes = {"image_size": image, "patch_size": patch, "num_channels": channels}
    model, stock = encoder_pair(family, **sizes)
    for rows in (1, 3, 0):
        x = pixels(stock, rows)
        want = stock.embeddings(x)
        convolutions.clear()
        got = family_file(family).embed(model, {"pixel_values": x})
        assert not convolutions, "the module was called"
        assert_same([got], [want], f"{family} {image} {patch}")
        strided = x.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(family_file(family).embed(model, {"pixel_values": strided}), got)
        trials(2)


def set_positions(model, change) -> None:
    embeddings = model.embeddings
    embeddings.position_embeddings = torch.nn.Parameter(change(embeddings.position_embeddings.data))


def add_tokens(model) -> None:
    draw = torch.Generator().manual_seed(1)
    model.embeddings.cls_token = torch.nn.Parameter(torch.randn(1, 3, 32, generator=draw))
    set_positions(model, lambda p: torch.cat((p, p[:, :2]), 1))


@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_whatever_is_no_cutting_is_left_to_the_module(family, convolutions):
    odd = torch.nn.Conv2d(3, 32, 6, 6, padding=3)
    changes = {
        "padding": lambda m: setattr(m.embeddings.patch_embeddings, "projection", odd),
        "a linear": lambda m: setattr(
            m.embeddings.patch_embeddings, "projection", torch.nn.Linear(30, 30)
        ),
        "no dropout": lambda m: setattr(m.embeddings, "dropout", torch.nn.ReLU().eval()),
        "no bias": lambda m: setattr(m.embeddings.patch_embeddings.projection, "bias", None),
        "stride": lambda m: setattr(m.embeddings.patch_embeddings.projection, "stride", (3, 3)),
        "positions of each row": lambda m: set_positions(m, lambda p: p.repeat(3, 1, 1)),
        "positions of fp64": lambda m: set_positions(m, torch.Tensor.double),
        "more tokens": add_tokens,
        "pictures too large": lambda m: None,
    }
    for name, change in changes.items():
        model, stock = encoder_pair(family)
        for m in (model, stock):
            change(m)
        x = pixels(stock) if name != "pictures too large" else torch.randn(3, 3, 36, 30)
        convolutions.clear()
        got = outcome(lambda: [model(pixel_values=x).last_hidden_state])
        assert convolutions or name == "a linear", name
        assert_same_outcome(got, outcome(lambda: [stock(pixel_values=x).last_hidden_state]), name)


def drop_out(embeddings):
    embeddings.dropout.p, embeddings.dropout.training = 0.5, True


@pytest.mark.parametrize("family", VISION)
@torch.no_grad()
def test_dropout_in_training_mode_is_the_module_s(family, convolutions):
    model, stock = encoder_pair(family)
    found = []
    for m in (model, stock):
        drop_out(m.embeddings)
        torch.manual_seed(7)
        found.append(m(pixel_values=pixels(m)).last_hidden_state)
    assert len(convolutions) == 2
    assert_same([found[0]], [found[1]], family)


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_hook_keeps_what_it_saw(family):
    inner = "patch_embeddings.projection" if family in VISION else "LayerNorm"
    for name in ("", inner, "dropout"):
        model, stock = encoder_pair(family)
        call = {"pixel_values": pixels(model)} if family in VISION else sample(family)
        kept: list = []
        for m in (model, stock):
            place = m.embeddings.get_submodule(name)
            place.register_forward_hook(lambda module, args, out: kept.append(out))
            found = m(**call).last_hidden_state
            kept.append(found)
        assert_same(kept[:2], kept[2:], f"{family}: hook on embeddings.{name}")
        assert noted(model).calls["encode"] == 1
        assert kept[0].data_ptr() != kept[1].data_ptr()


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_hook_may_change_the_layers(family):
    model, stock = encoder_pair(family)
    call = {"pixel_values": pixels(model)} if family in VISION else sample(family)
    found = []
    for m in (model, stock):
        before = m(**call).last_hidden_state
        layers = next(n for n in m.modules() if isinstance(n, torch.nn.ModuleList))
        weight = next(n for n in layers.modules() if isinstance(n, torch.nn.Linear)).weight

        def hook(module, args, out, weight=weight):
            weight.data = 2.0 * weight.data

        m.embeddings.register_forward_hook(hook)
        found.append([m(**call).last_hidden_state for _ in range(2)])
        assert not torch.equal(found[-1][0], before)
    assert_same(*found, family)
    assert noted(model).calls["encode"] == 3
    model, stock = encoder_pair(family)
    for m in (model, stock):
        layers = next(n for n in m.modules() if isinstance(n, torch.nn.ModuleList))
        m.embeddings.register_forward_hook(lambda *_, layers=layers: layers.half() and None)
    got, want = (outcome(lambda m=m: [m(**call).last_hidden_state]) for m in (model, stock))
    assert_same_outcome(got, want, f"{family}, layers cast on the way")


def ask_in_a_hook(embeddings, ran: list) -> None:
    embeddings.register_forward_hook(lambda module, args, out: ran.append(out.requires_grad_()))


def hold_a_plain_weight(embeddings, ran: list) -> None:
    norm = next((m for m in embeddings.modules() if hasattr(m, "eps")), None)
    place, name = (norm, "bias") if norm is not None else (embeddings, "cls_token")
    plain = getattr(place, name).detach().clone().requires_grad_()
    delattr(place, name)
    setattr(place, name, plain)
    ran.append(plain)


@pytest.mark.parametrize("ask", (ask_in_a_hook, hold_a_plain_weight))
@pytest.mark.parametrize("family", ENCODERS)
def test_gradients_that_no_parameter_asks_for_are_stock_s(family, ask):
    model, stock = encoder_pair(family)
    call = {"pixel_values": pixels(model)} if family in VISION else sample(family)
    found = []
    for m in (model, stock):
        ran: list = []
        ask(m.requires_grad_(False).embeddings, ran)
        m(**call).last_hidden_state.square().sum().backward()
        assert len(ran) == 1, f"ran {len(ran)} times"
        found.append(ran[0].grad)
    assert torch.equal(*found) and bool(found[0].any())
    assert set(noted(model).refused) == {Reason.GRADIENTS.value}


def doubled(forward):
    return lambda module, *args, **kwargs: 2.0 * forward(module, *args, **kwargs)


@pytest.mark.parametrize("on_class", (False, True), ids=("instance", "class"))
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_replaced_forward_is_called(family, on_class, monkeypatch):
    # LayerNorm is also the layers', where another forward of the class is refused
    inner = "patch_embeddings" if family in VISION else "" if on_class else "LayerNorm"
    for name in {"", inner}:
        model, stock = encoder_pair(family)
        call = {"pixel_values": pixels(model)} if family in VISION else sample(family)
        plain = stock(**call).last_hidden_state
        with monkeypatch.context() as patch:
            places = [m.embeddings.get_submodule(name) for m in (model, stock)]
            replaced = doubled(type(places[0]).forward)
            for place in places if not on_class else ():
                patch.setattr(place, "forward", replaced.__get__(place), raising=False)
            if on_class:
                patch.setattr(type(places[0]), "forward", replaced)
            found = [m(**call).last_hidden_state for m in (model, stock)]
        assert_same(found[:1], found[1:], f"{family}: {name or 'embeddings'}")
        assert not torch.equal(found[1], plain)
        assert noted(model).calls["encode"] == 1


@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_inputs_and_parameters_stay(family):
    model, _ = encoder_pair(family)
    calls = [{"pixel_values": pixels(model)}] if family in VISION else [sample(family)]
    if family not in VISION:
        calls += [sample(family, mask="right"), {"inputs_embeds": torch.randn(3, 17, 32)}]
    parameters = [p.clone() for p in model.parameters()]
    for call in calls:
        given = {name: value.clone() for name, value in call.items()}
        first = model(**call).last_hidden_state
        again = model(**call).last_hidden_state
        assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
        assert all(torch.equal(call[name], value) for name, value in given.items())
    assert all(map(torch.equal, model.parameters(), parameters))
    assert hf_fusion.stats(model).calls["encode"] == 2 * len(calls)


# of ViT-B/16, whose layers are all alike: largest share of stock's peak
@pytest.mark.parametrize("dtype, most", ((torch.float32, 0.34), (torch.bfloat16, 0.5)), ids=str)
@torch.no_grad()
def test_a_vit_holds_at_most_half_of_what_stock_holds(dtype, most):
    from transformers import ViTConfig, ViTModel

    torch.set_num_threads(2)
    model = ViTModel(ViTConfig(num_hidden_layers=2), add_pooling_layer=False).eval().to(dtype)
    for rows in (1, 8):
        x = pixels(model, rows, dtype)

        def held(x: torch.Tensor = x) -> int:
            model(pixel_values=x)
            return meter.peak_bytes(lambda: model(pixel_values=x))

        stock = held()
        with hf_fusion.patched(model, packed=False):
            ours = held()
        assert ours <= most * stock, f"{rows} images: {ours} of stock's {stock} bytes"
