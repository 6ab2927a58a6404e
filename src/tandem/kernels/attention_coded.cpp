// Attention to pages of codes (coded.h) and to pages as they were made beside them, for one layer. Contract in span_pool.py.
#include "attention.h"

using namespace tandem;

extern "C" {
void attention_coded_bf16(const AttentionArgs* a) { attend<bf16, coded>(*a); }
void attention_coded_fp32(const AttentionArgs* a) { attend<float, coded>(*a); }
}
