// What the host back end promises beside running kernels: conversions, refusals, replay.
#include <cmath>

#include "port_case.h"

namespace hff_test {
namespace {

using namespace hff::port;

std::string complaint(const char* format, double a, double b) {
  char text[160];
  std::snprintf(text, sizeof(text), format, a, b);
  return text;
}

// Every finite number comes back; halfway between neighbours the even one wins; past the largest by
// half a step there is infinity.
template <class T>
std::string check_rounding(uint16_t infinity) {
  for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
    for (uint32_t body = 0; body < infinity; ++body) {
      const T low{uint16_t(sign | body)}, high{uint16_t(sign | (body + 1))};
      const float a = to_float(low);
      if (from_float<T>(a).bits != low.bits)
        return complaint("%g comes back as %g", a, to_float(from_float<T>(a)));
      const float step =
          body + 1 < infinity ? to_float(high) - a : a - to_float(T{uint16_t(low.bits - 1)});
      const float half_way = a + step / 2;
      const uint16_t even = body % 2 == 0 ? low.bits : high.bits;
      if (from_float<T>(half_way).bits != even) {
        return complaint("%.9g is rounded to %g", half_way, to_float(from_float<T>(half_way)));
      }
      if (from_float<T>(std::nextafter(half_way, 0.0f)).bits != low.bits ||
          from_float<T>(std::nextafter(half_way, 2 * half_way)).bits != high.bits) {
        return complaint("about %.9g, rounding goes to the farther of %g", half_way, a);
      }
    }
  }
  for (uint32_t body = infinity + 1u; body < 0x8000; ++body) {
    const float nan = to_float(T{uint16_t(body)});
    if (!std::isnan(nan) || !std::isnan(to_float(from_float<T>(nan)))) {
      return complaint("NaN %g becomes %g", body, nan);
    }
  }
  return "";
}

struct Eights {
  void* x;  // 8 of them, twice
};

template <class T>
HFF_KERNEL(32)
void doubled(HFF_PARAM(Eights) p) {
  float v[8], w[8];
  if (thread() != 0) return;
  load8(static_cast<const T*>(p.x), v);
  load8_once(static_cast<const T*>(p.x), w);
  for (int i = 0; i < 8; ++i) v[i] += w[i];
  store8(static_cast<T*>(p.x) + 8, v);
}

template <class T>
std::string check_eights() {
  alignas(16) T x[16];
  for (int i = 0; i < 16; ++i) x[i] = from_float<T>(0.25f * float(i) - 1.0f);
  if (launch(Launch(), doubled<T>, Eights{x}) != HFF_OK) return hff::fibers::report();
  for (int i = 0; i < 8; ++i) {
    if (to_float(x[8 + i]) != 2 * to_float(x[i])) {
      return complaint("twice %g is %g", to_float(x[i]), to_float(x[8 + i]));
    }
  }
  if (launch(Launch(), doubled<T>, Eights{reinterpret_cast<char*>(x) + 8}) == HFF_OK) {
    return "load8 from 8 bytes on was accepted";
  }
  return "";
}

// ---- launches -----------------------------------------------------------------------------------

struct Nothing {};
HFF_KERNEL(1024) void nothing(HFF_PARAM(Nothing)) {}

HFF_KERNEL(64)
void overruns(HFF_PARAM(Nothing)) {
  if (thread() == 3) arena()[100] = 1;
}

HFF_KERNEL(32)
void launches(HFF_PARAM(Nothing) p) {
  if (thread() == 5) launch(Launch(), nothing, p);
}

HFF_KERNEL(64)
void races(HFF_PARAM(Eights) p) {
  float* shared = reinterpret_cast<float*>(arena());
  shared[0] = float(thread());
  sync_warp();
  add_acq_rel(static_cast<uint32_t*>(p.x), 1);
  if (shared[0] == 63.0f) trap("63 came last");
}

// Threads below `early` read before they wait for the launch ahead; from `late` on none waits.
struct Dependent {
  float* x;
  int early, late;
};
HFF_KERNEL(32)
void depends(HFF_PARAM(Dependent) p) {
  float sum = 0.0f;
  if (thread() < p.early) sum += load_fresh(p.x);
  if (thread() < p.late) dependencies_wait();
  if (thread() == 0) p.x[1] = sum + load_fresh(p.x);
}
HFF_KERNEL(32)
void counts_early(HFF_PARAM(Eights) p) {
  add_acq_rel(static_cast<uint32_t*>(p.x), 1);
  dependencies_wait();
}

// The launch is refused, or ends, with a report that contains `why`.
template <class P>
std::string expect_report(const Launch& l, Kernel<P> kernel, const P& params, const char* why) {
  if (launch(l, kernel, params) == HFF_OK) return std::string("accepted despite: ") + why;
  const std::string report = hff::fibers::report();
  return report.find(why) != std::string::npos ? "" : report + " instead of: " + why;
}

Launch shaped(int grid, int threads, int cluster, int shared, bool cooperative) {
  Launch launch;
  launch.grid = grid, launch.threads = threads, launch.cluster = cluster;
  launch.shared_bytes = shared, launch.cooperative = cooperative;
  return launch;
}

std::string check_refusals() {
  struct Refusal {
    Launch launch;
    int arch;
    const char* why;
  };
  const int sms = hff::fibers::options().device.sms;
  const Refusal refusals[] = {
      {shaped(1, 48, 1, 0, false), 900, "48 threads"},
      {shaped(1, 2048, 1, 0, false), 900, "2048 threads"},
      {shaped(3, 32, 2, 0, false), 900, "3 blocks in clusters of 2"},
      {shaped(2, 32, 2, 0, false), 890, "clusters need sm_90"},
      {shaped(1, 32, 1, 232449, false), 900, "the limit is 232448"},
      {shaped(sms + 1, 32, 1, 232448, true), 900, "cannot be resident at once"},
  };
  std::string seen;
  for (const Refusal& r : refusals) {
    hff::fibers::options().device.arch = r.arch;
    seen += expect_report(r.launch, nothing, Nothing(), r.why);
    hff::fibers::options().device.arch = 900;
  }
  if (launch(shaped(sms, 1024, 1, 232448, true), nothing, Nothing()) != HFF_OK) {
    seen += hff::fibers::report();
  }
  seen += expect_report(Launch(), launches, Nothing(), "thread 5: launch: a kernel cannot");
  return seen + expect_report(shaped(1, 64, 1, 100, false), overruns, Nothing(),
                              "wrote shared + 100, it has 100 bytes");
}

std::string check_dependents() {
  float x[2] = {1.5f, 0.0f};
  uint32_t word = 0;
  Launch early;
  early.dependent = true;
  const auto ask = [&](Dependent p, const char* why) {
    return expect_report(early, depends, p, why);
  };
  if (launch(early, depends, Dependent{x, 0, 32}) != HFF_OK || x[1] != 1.5f)
    return hff::fibers::report();
  if (launch(Launch(), depends, Dependent{x, 32, 0}) != HFF_OK) return hff::fibers::report();
  return ask({x, 1, 32}, "load_fresh: ") +
         ask({x, 0, 31}, "thread 31: exit: no dependencies_wait in a launch that may start early") +
         expect_report(early, counts_early, Eights{&word}, "global memory, before");
}

// A seed is a run: its switches and its report. Other seeds are other runs.
std::string check_replay() {
  std::vector<uint64_t> switches;
  std::vector<std::string> reports;
  for (int pass = 0; pass < 2; ++pass) {
    for (uint64_t seed = 1; seed <= 40; ++seed) {
      uint32_t word = 0;
      hff::fibers::options().seed = seed;
      launch(shaped(3, 64, 1, 16, false), races, Eights{&word});
      if (pass == 0) {
        switches.push_back(hff::fibers::switches());
        reports.push_back(hff::fibers::report());
      } else if (switches[seed - 1] != hff::fibers::switches() ||
                 reports[seed - 1] != hff::fibers::report()) {
        return complaint("seed %g is not replayed, pass %g", double(seed), pass);
      }
    }
  }
  size_t clean = 0;
  for (const std::string& report : reports) clean += report.empty() ? 1 : 0;
  if (clean == 0 || clean == reports.size()) {
    return complaint("%g of %g seeds saw no race: all seeds are alike", double(clean),
                     double(reports.size()));
  }
  return "";
}

}  // namespace

std::string check_numbers() {
  std::string seen = check_rounding<half>(0x7c00) + check_rounding<bfloat16>(0x7f80);
  seen += check_eights<half>() + check_eights<bfloat16>() + check_eights<float>();
  if (hff::port::exp2(-126.0f) != 0x1p-126f || hff::port::exp2(-126.5f) != 0.0f) {
    seen += "exp2 does not flush subnormals";
  }
  return seen;
}

std::string check_launches() {
  Device device;
  std::string seen = check_refusals() + check_dependents() + check_replay();
  if (describe(0, &device) != HFF_OK || device.arch != 900) seen += "there is no device 0";
  if (describe(1, &device) != HFF_UNSUPPORTED) seen += "there is a device 1";
  if (max_active_clusters(nothing, shaped(1, 1024, 2, 0, false)) != device.sms) {
    seen += "max_active_clusters";
  }
  return seen;
}

}  // namespace hff_test
