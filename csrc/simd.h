// One build serves any x86-64 machine: the loader picks the widest version that the processor runs.
#pragma once
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define DDPM_X86 1
#define DDPM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DDPM_CLONES
#endif
