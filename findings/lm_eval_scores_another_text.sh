#!/usr/bin/env bash
# lm_eval 0.4.13, tokenizers 0.23.3: a continuation is cut out of the whole text's tokens by the number of the context's
# own tokens. Where the whole is tokenised into other pieces, what is scored spells another text, or nothing is scored,
# without a word. Seen, with a vocabulary that joins "bc" before "ab": asked "ab" + "c", scored "ab" + "bc", which is
# "abbc"; asked "a" + "b", nothing is left.
# Exits non-zero if that changed.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q "lm_eval==0.4.13" "tokenizers==0.23.3"
"$place/venv/bin/python" - <<'PY' 2>/dev/null
import sys
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, models

words = ["a", "b", "c", "bc", "ab"]
tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("b", "c"), ("a", "b")]))
seen = []


class Spelt(TemplateLM):
    eot_token_id = 0

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return tokenizer.encode(string).ids

    def _loglikelihood_tokens(self, requests, **kwargs):
        for (context, continuation), before, scored in requests:
            spelt = ["".join(words[i] for i in part) for part in (before, scored)]
            seen.append((context + continuation, spelt))
            print(f"asked {context!r} + {continuation!r}, scored {spelt[0]!r} + {spelt[1]!r}")
        return [(0.0, False)] * len(requests)

    loglikelihood_rolling = generate_until = None


asked = [("ab", "c"), ("a", "b")]
Spelt().loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked], disable_tqdm=True)
sys.exit(seen != [("abc", ["ab", "bc"]), ("ab", ["a", ""])])
PY
