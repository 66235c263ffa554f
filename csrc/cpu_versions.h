// Several versions of a function of vectorisable loops, of which the loader takes the best that the processor runs.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTADAPT_CPU_VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTADAPT_CPU_VERSIONS
#endif

// What such functions call has to become part of each version.
#define FASTADAPT_INLINED __attribute__((always_inline))
#define FASTADAPT_INLINE inline FASTADAPT_INLINED
