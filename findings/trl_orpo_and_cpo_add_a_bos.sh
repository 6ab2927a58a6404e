#!/usr/bin/env bash
# trl 1.16.0 (transformers 5.24.0): the experimental trainers ORPOTrainer and CPOTrainer (SimPO too) put the tokeniser's
# bos before what its chat template wrote, and its eos behind, wherever the rows do not have them there. Many templates
# write neither: then every log-prob is of a token behind a context that no prompt of the model has, and an eos is
# trained that ends no turn. DPOTrainer, of the same rows and tokeniser, adds nothing; so losses and margins of the
# two kinds are not of the same sequences. Nothing is said.
# Takes a minute, most of it for installing. Output seen: the lines under "expected".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/expected" <<'END'
template user 1 2 . assistant 3 .
DPO user 1 2 . assistant 3 .
ORPO <bos> user 1 2 . assistant 3 . <eos>
CPO <bos> user 1 2 . assistant 3 . <eos>
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check trl==1.16.0 transformers==5.24.0 datasets==5.2.0
cd "$folder"
cat > look.py <<'END'
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", ".", "1", "2", "3", "4"]
words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
words.pre_tokenizer = WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
)
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} . {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
asked, right, wrong = (
    [{"role": role, "content": text}] for role, text in (("user", "1 2"), ("assistant", "3"), ("assistant", "4"))
)
rows = Dataset.from_list([{"prompt": asked, "chosen": right, "rejected": wrong}])
common = {
    "output_dir": "out", "per_device_train_batch_size": 1, "use_cpu": True, "bf16": False, "report_to": [],
    "save_strategy": "no", "gradient_checkpointing": False,
}


def model():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))


def show(name, ids):
    print(name, *(word for word in tokenizer.convert_ids_to_tokens(ids) if word != "<pad>"))


both = tokenizer.apply_chat_template(asked + right, tokenize=False)
show("template", tokenizer(both, add_special_tokens=False)["input_ids"])
(batch,) = DPOTrainer(
    model(), model(), DPOConfig(**common), train_dataset=rows, processing_class=tokenizer
).get_train_dataloader()
show("DPO", batch["input_ids"][0].tolist())
for name, config, trainer in (("ORPO", ORPOConfig, ORPOTrainer), ("CPO", CPOConfig, CPOTrainer)):
    made = trainer(model=model(), args=config(**common), train_dataset=rows, processing_class=tokenizer)
    (batch,) = made.get_train_dataloader()
    show(name, batch["chosen_input_ids"][0].tolist())
END
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 CUDA_VISIBLE_DEVICES=
"$folder/venv/bin/python" -W ignore look.py > seen 2> err || { tail -20 err >&2; exit 1; }
grep -E '^(template|DPO|ORPO|CPO) ' seen > lines
diff expected lines
