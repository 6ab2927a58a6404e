// Attention to keys and values in int8 (attention_eights.h) for one layer. Contract in attention.py.
#include "attention.h"

using namespace tandem;

extern "C" {
void attention_int8_bf16(const AttentionArgs* a) { attend<bf16, int8_t>(*a); }
void attention_int8_fp32(const AttentionArgs* a) { attend<float, int8_t>(*a); }
}
