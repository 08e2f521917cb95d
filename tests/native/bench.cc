// Time of each kernel beside the read stream measured in the same round, caches cold, with the
// parity verdict of the very call that was timed. Pythia-160m's shapes.
#include <chrono>
#include <cstdio>

#include "trial.h"

namespace hff_test {
namespace {

constexpr int64_t kStreamBytes = 512ll << 20;

struct Bench {
  const char* name;
  const Kernel& kernel;
  Design design;
};

std::vector<Bench> benches() {
  Design norm, linear, head, rows, block, decode;
  norm.hidden = 768, norm.batch = 16;
  linear.hidden = 768, linear.width = 3072, linear.batch = 1;
  head.hidden = 768, head.width = 50304, head.batch = 1;
  rows = linear;
  rows.batch = 197;
  Design packed = rows;
  packed.packed = true;
  block.hidden = 768, block.heads = 12, block.past = 128, block.queries = 1, block.batch = 1;
  decode = block;
  decode.layers = 12, decode.vocab = 50304;
  Design decode4 = decode;
  decode4.batch = 4;
  Design prompt = block, encoder = block;
  prompt.past = 0, prompt.queries = 128;
  encoder.past = -1, encoder.queries = 197, encoder.packed = true;
  return {{"norm 16 x 768", kKernels[0], norm},
          {"linear 768 -> 3072", kKernels[1], linear},
          {"linear 768 -> 50304", kKernels[1], head},
          {"linear 768 -> 3072, 197 rows", kKernels[1], rows},
          {"the same, packed", kKernels[1], packed},
          {"block 160m, past 128", kKernels[2], block},
          {"block 160m, prompt of 128", kKernels[2], prompt},
          {"block 160m, 197 rows, packed", kKernels[2], encoder},
          {"model 160m, past 128", kKernels[3], decode},
          {"model 160m, batch 4", kKernels[3], decode4}};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

bool run_bench(const Options& options, const std::string& isa) {
  std::vector<char> stream(static_cast<size_t>(kStreamBytes), 1);
  hff_huge_pages(stream.data(), kStreamBytes);
  bool clean = true;
  std::printf("%-30s %-5s %-12s %9s %8s %9s %7s  %s\n", "kernel", "dtype", "isa", "us", "GB/s",
              "stream", "share", "parity");
  for (const Bench& bench : benches()) {
    if (!options.only.empty() && !options.only.count(bench.kernel.name)) continue;
    for (const int32_t dtype : {HFF_BF16, HFF_F16, HFF_F32}) {
      Random random(options.seed);
      Design design = bench.design;
      design.dtype = dtype;
      const auto c = bench.kernel.make(random, design);
      c->compute_reference();
      for (Buffer& buffer : c->arena.buffers()) hff_huge_pages(buffer.data, buffer.bytes);
      c->seal();
      std::vector<double> seconds, streams;
      std::string failure;
      for (int64_t i = 0; i < options.count(11) && failure.empty(); ++i) {
        c->restore();
        streams.push_back(hff_read_stream(stream.data(), kStreamBytes, options.threads));
        const auto begin = std::chrono::steady_clock::now();
        const hff_status status = c->call(options.threads);
        seconds.push_back(
            std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        if (status) failure = hff_last_error();
      }
      if (failure.empty()) failure = check_memory(*c);
      if (failure.empty()) failure = check_parity(*c, nullptr);
      const double time = median(seconds),
                   rate = static_cast<double>(c->bytes_read()) / time * 1e-9;
      const double read = static_cast<double>(kStreamBytes) / median(streams) * 1e-9;
      std::printf("%-30s %-5s %-12s %9.1f %8.2f %9.2f %7.2f  %s\n", bench.name, dtype_name(dtype),
                  isa.c_str(), time * 1e6, rate, read, rate / read,
                  failure.empty() ? "holds" : failure.c_str());
      std::fflush(stdout);
      clean = clean && failure.empty();
    }
  }
  return clean;
}

}  // namespace hff_test
