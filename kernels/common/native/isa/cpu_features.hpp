// What this machine can do: instruction sets and hardware threads. No torch, no Python.
#pragma once

#include <string>
#include <vector>

namespace linattn {

// Names as Linux prints them in /proc/cpuinfo (x86: "avx2", "fma", "avx512f", "amx_bf16", ...; ARM: "asimd", "sve",
// ...).
// A set is listed only when the processor has it and the operating system saves its registers. For AMX the kernel's
// permission to use tiles is requested, and the AMX names appear only when it was granted.
std::vector<std::string> cpu_features();

// Threads that this process may run at once: its CPU affinity where the system has one, else all hardware threads.
int hardware_threads();

}  // namespace linattn
