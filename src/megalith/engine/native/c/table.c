/* The kernels of one instruction set, by name. */
#include "kernels.h"

void KERNEL(multiply)(const struct product *, int, int);
void KERNEL(quantize)(const float *, int, const struct activations *);
void KERNEL(multiply_planes)(const struct product *, int, int);
void KERNEL(quantize_planes)(const float *, int, const struct activations *);
void KERNEL(norm)(const float *, const float *, int, float, float *);
void KERNEL(rope)(float *, const float *, const float *, int, float);
void KERNEL(activate)(int, float *, const float *, int);
void KERNEL(add)(float *, const float *, int);
void KERNEL(store_kv)(const float *, const float *, int, uint16_t *, uint16_t *, int);
void KERNEL(attend)(const struct attention_tile *);
int KERNEL(sample)(const struct sample_row *);

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

const struct kernels KERNEL(kernels) = {
    .name = TEXT_OF(MEGALITH_ISA),
    .multiply = KERNEL(multiply),
    .quantize = KERNEL(quantize),
    .multiply_planes = KERNEL(multiply_planes),
    .quantize_planes = KERNEL(quantize_planes),
    .norm = KERNEL(norm),
    .rope = KERNEL(rope),
    .activate = KERNEL(activate),
    .add = KERNEL(add),
    .store_kv = KERNEL(store_kv),
    .attend = KERNEL(attend),
    .sample = KERNEL(sample),
};
