#!/usr/bin/env bash
# math-verify 0.9.0 with its default extraction: plain answers that it reads as another value, and words as products.
#   "2 1/2", "1e5" and "1\,000" are 1, "- 3" is 3, "1,00,000" is 1.00, "The time is 10:30" is 10: each pays for a wrong answer
#   two boxes are one set; \boxed{3.} and \boxed{3,} are no number; "½", "−3" (U+2212) and "٣" are nothing
#   \boxed{silent} equals \boxed{listen}, and \boxed{ba} equals \boxed{ab}: letters side by side are factors
# Output seen: the lines under "expected" (answer, reply, verify).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0 \
    'antlr4-python3-runtime==4.13.2' sympy==1.14.0
cat > "$folder/expected" <<'END'
1 | 2 1/2 | True
5/2 | 2 1/2 | False
1 | 1e5 | True
1 | 1\,000 | True
3 | - 3 | True
1 | 1,00,000 | True
10 | The time is 10:30 | True
4 | \boxed{3}, no: \boxed{4} | False
3 | \boxed{3.} | False
3 | \boxed{3,} | False
1/2 | ½ | False
-3 | −3 | False
3 | ٣ | False
listen | \boxed{silent} | True
ab | \boxed{ba} | True
END
PYTHONIOENCODING=utf-8 "$folder/venv/bin/python" - "$folder/expected" 2> /dev/null > "$folder/seen" <<'END'
import sys

from math_verify import parse, verify

for line in open(sys.argv[1], encoding="utf-8"):
    answer, reply, _ = line.rstrip("\n").split(" | ")
    print(answer, reply, verify(parse(f"\\boxed{{{answer}}}"), parse(reply)), sep=" | ")
END
diff "$folder/expected" "$folder/seen"
