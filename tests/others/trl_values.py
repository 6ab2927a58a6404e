"""What TRL makes of one batch, for test_trl.py: `trl_values.py FOLDER` writes values.json, gradients.safetensors there.

FOLDER has models (policy, reference), a head (head.safetensors) and rows (pairs.jsonl, ratings.jsonl, chats.jsonl).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FOLDER = Path(sys.argv[1])
COMMON = {
    "output_dir": str(FOLDER / "out"),
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
DPO = {
    "dpo": {"loss_type": ["sigmoid"], "beta": 0.1},
    "robust_dpo": {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"loss_type": ["ipo"], "beta": 0.7},
    "dpo by length": {"loss_type": ["sigmoid_norm"], "beta": 0.5},
}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)


def spoken(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def measured(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first batch, which has all rows."""
    (batch,) = trainer.get_train_dataloader()
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return float(loss.detach()), grads


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "policy")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    # CPO and ORPO add both to what the chat template wrote, where a row does not begin and end so.
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    values, kept = dict[str, Any](), dict[str, torch.Tensor]()

    def note(name: str, trainer: Any) -> None:
        values[name], grads = measured(trainer)
        kept.update({f"{name}/{weight}": grad for weight, grad in grads.items()})

    pairs = [
        {side: spoken("user" if side == "prompt" else "assistant", row[side]) for side in row if side != "margin"}
        | {"margin": row["margin"]}
        for row in rows("pairs")
    ]
    plain = Dataset.from_list([{name: value for name, value in row.items() if name != "margin"} for row in pairs])
    size = {"per_device_train_batch_size": len(pairs)}
    for name, settings in DPO.items():
        config = DPOConfig(**COMMON, **size, **settings, max_length=None)
        note(name, DPOTrainer(model("policy"), model("reference"), config, train_dataset=plain,
                              processing_class=tokenizer))  # fmt: skip
    both = {**COMMON, **size, "max_length": 512, "disable_dropout": True}
    simpo = CPOConfig(**both, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    note("simpo", CPOTrainer(model=model("policy"), args=simpo, train_dataset=plain, processing_class=tokenizer))
    orpo = ORPOTrainer(model=model("policy"), args=ORPOConfig(**both, beta=0.3), train_dataset=plain,
                       processing_class=tokenizer)  # fmt: skip
    (batch,) = orpo.get_train_dataloader()
    metrics = orpo.get_batch_loss_metrics(orpo.model, batch)[1]
    values["orpo"] = -0.3 * float(metrics["log_odds_ratio"])

    rated = [
        {"prompt": spoken("user", row["prompt"]), "completion": spoken("assistant", row["completion"]),
         "label": row["label"]} for row in rows("ratings")
    ]  # fmt: skip
    config = KTOConfig(**COMMON, per_device_train_batch_size=len(rated), beta=0.3, desirable_weight=1.3,
                       undesirable_weight=0.8, max_length=None)  # fmt: skip
    note("kto", KTOTrainer(model("policy"), model("reference"), config, train_dataset=Dataset.from_list(rated),
                           processing_class=tokenizer))  # fmt: skip

    judge = AutoModelForSequenceClassification.from_pretrained(FOLDER / "policy", num_labels=1, dtype=torch.float32)
    judge.score.weight.data.copy_(load_file(FOLDER / "head.safetensors")["score.weight"])
    judge.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(**COMMON, **size, center_rewards_coefficient=0.1, max_length=None, disable_dropout=True)
    note("reward_model", RewardTrainer(judge, config, train_dataset=Dataset.from_list(pairs),
                                       processing_class=tokenizer))  # fmt: skip

    chats = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows("chats")]
    config = SFTConfig(**COMMON, per_device_train_batch_size=len(chats), completion_only_loss=True, max_length=None)
    note("next_token", SFTTrainer(model("policy"), config, train_dataset=Dataset.from_list(chats),
                                  processing_class=tokenizer))  # fmt: skip
    save_file(kept, FOLDER / "gradients.safetensors")
    (FOLDER / "values.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
