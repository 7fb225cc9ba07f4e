/* Which instruction sets this library has, and which this machine can run. */
#include "model.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#ifdef MEGALITH_HAVE_AVX512VNNI
extern const struct kernels kernels_avx512vnni;
#endif
#ifdef MEGALITH_HAVE_AVX2
extern const struct kernels kernels_avx2;
#endif
#ifdef MEGALITH_HAVE_EMULATED
extern const struct kernels kernels_emulated;
#endif
extern const struct kernels kernels_portable;

static int machine_has(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init(); /* also asks the operating system whether it saves the wide registers */
    unsigned a, b, c = 0, d;
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1); /* not every compiler knows it by name */
    int avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (strcmp(name, "avx2") == 0 || strcmp(name, "emulated") == 0) return avx2;
    if (strcmp(name, "avx512vnni") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
#endif
    return strcmp(name, "portable") == 0;
}

/* Best first. The emulation is for tests only and never chosen by itself. */
static const struct kernels *const built[] = {
#ifdef MEGALITH_HAVE_AVX512VNNI
    &kernels_avx512vnni,
#endif
#ifdef MEGALITH_HAVE_AVX2
    &kernels_avx2,
#endif
    &kernels_portable,
#ifdef MEGALITH_HAVE_EMULATED
    &kernels_emulated,
#endif
};
#define BUILT (sizeof built / sizeof *built)

const struct kernels *kernels_by_name(const char *name) {
    for (size_t i = 0; i < BUILT; i++)
        if ((name == NULL || strcmp(built[i]->name, name) == 0) && machine_has(built[i]->name)) return built[i];
    return NULL;
}

const char *native_isas(int32_t usable) {
    static _Thread_local char names[128];
    names[0] = 0;
    for (size_t i = 0; i < BUILT; i++) {
        if (usable && !machine_has(built[i]->name)) continue;
        if (names[0]) strcat(names, ",");
        strcat(names, built[i]->name);
    }
    return names;
}

int32_t native_struct_sizes(int32_t *sizes, int32_t room) {
    const int32_t all[] = {sizeof(struct native_config), sizeof(struct native_batch), sizeof(struct native_sampling),
                           sizeof(struct native_result), sizeof(struct native_memory), sizeof(struct native_window)};
    int32_t count = sizeof all / sizeof *all;
    for (int32_t i = 0; i < count && i < room; i++) sizes[i] = all[i];
    return count < room ? count : room;
}
