// Which 16-bit type weights, adapters, activations and the cache have in this build of the kernels: bf16, or fp16 where
// LORAMUX_F16 is defined. Kernels of the fp16 build have names that end in `_f16`.
//
// What depends on the type is in a namespace of its name, so that one program can hold both builds, as the emulator does.
#pragma once

#if defined(LORAMUX_F16)
#define ELEMENT f16
#define KERNEL_NAME(name) name##_f16
#else
#define ELEMENT bf16
#define KERNEL_NAME(name) name
#endif

inline namespace ELEMENT {
struct element;
}
