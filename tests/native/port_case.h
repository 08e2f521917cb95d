// A case of the fiber engine is a small kernel: right, or with one fault. A right one must give the
// bits of its plain reference under every seed; a fault must be found within the seeds, by a report
// or by other bits.
#ifndef HFF_TESTS_PORT_CASE_H
#define HFF_TESTS_PORT_CASE_H

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/port.h"
#include "random.h"

namespace hff_test {

struct PortCase {
  const char* name;
  // What shows the fault: a part of the report, kOtherBits, or null in a kernel that is right.
  const char* symptom;
  // Runs under the options that are set; "" or what went wrong, kOtherBits with it.
  std::string (*run)();
};
constexpr const char* kOtherBits = "other bits";

const std::vector<PortCase>& block_cases();   // block, warp and cluster
const std::vector<PortCase>& ring_cases();    // copies and their barriers
const std::vector<PortCase>& grid_cases();    // between blocks
const std::vector<PortCase>& attend_cases();  // the attention kernels by themselves
std::string check_numbers();                  // "" or what is wrong with the conversions
std::string check_launches();                 // what a launch refuses, and replay

// Numbers whose sum depends on the order in which they are added.
inline std::vector<float> scattered(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (float& value : values) {
    value = float(random.symmetric()) * float(1 << random.range(0, 12));
  }
  return values;
}

// Launches; then the report, or the first number that is not as it should be.
template <class P>
std::string judge(const hff::port::Launch& launch, hff::port::Kernel<P> kernel, const P& params,
                  const std::vector<float>& out, const std::vector<float>& expected) {
  if (hff::port::launch(launch, kernel, params) != HFF_OK) return hff::fibers::report();
  for (size_t i = 0; i < out.size(); ++i) {
    if (std::memcmp(&out[i], &expected[i], 4) == 0) continue;
    char text[120];
    std::snprintf(text, sizeof(text), "%s: [%zu] is %.9g instead of %.9g", kOtherBits, i,
                  double(out[i]), double(expected[i]));
    return text;
  }
  return "";
}

}  // namespace hff_test
#endif
