// What this machine lacks for an instruction set, as a sentence; null where nothing. CPUID says
// what the CPU has and XCR0 what the operating system saves: registers that it does not save count
// as absent. Not __builtin_cpu_supports: gcc 10 and clang 14 do not know F16C.
#pragma once

namespace hff {

const char* lacks_avx2();
const char* lacks_avx512();
const char* lacks_avx512_bf16();
const char* lacks_amx();  // asks the kernel for the state of tiles, once

}  // namespace hff
