"""tandem's engine as a model of lm-eval (EleutherAI's lm-evaluation-harness): `python -m tandem.run.lm_eval run --model
tandem --model_args pretrained=MODEL --tasks ...` is its own command line with one more model. docs/evaluation.md.

Texts become tokens as in lm-eval's Transformers backend (HFLM), whose scores these are, oddities included: the prefix
token before a rolling text that begins with it already, the context's tokens in the place of what the whole text has.
Needs lm_eval, which the package does not bring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tandem.config import flatten, override
from tandem.errors import ConfigError, EngineError, nearest
from tandem.models.config import ModelConfig
from tandem.numerics.random import derive_seed
from tandem.rollout.config import RolloutConfig
from tandem.run.config import RunConfig
from tandem.run.model import in_order
from tandem.run.parts import build_parts
from tandem.types import Completion, Message, Request, Sampling, likely_tokens

PIN = "lm_eval==0.4.13"  # that its scores were compared with
Pair = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts or none, tokens of the context, those to be scored)
SAMPLED = {"top_k": int, "top_p": float, "min_p": float}


@register_model("tandem")
class TandemLM(TemplateLM):
    """model_args: `pretrained`, a model as of `tandem generate`; `max_length`, tokens of a window that is scored, and
    of a context with its answer (at most, and by default, the model's positions less 2); `max_gen_toks` (256), `seed`,
    `add_bos_token`, `prefix_token_id` and `think_end_token` (a text) as of HFLM; and any setting of `model.` and
    `engine.` by its dotted name. `batch_size` has no use: the engine fills its own batches.
    """

    def __init__(
        self,
        pretrained: str,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        device: str | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        for ignored in ("batch_size", "max_batch_size"):
            more.pop(ignored, None)
        self.add_bos_token: bool | None = more.pop("add_bos_token", None)
        self._prefix: int | None = more.pop("prefix_token_id", None)
        self.think_end_token: str | None = more.pop("think_end_token", None)
        config = RunConfig("lm_eval", 1, ModelConfig(str(pretrained)))
        settings = [name for name in flatten(config) if name.startswith(("model.", "engine."))]
        for name in more:
            if name not in settings:
                known = ("max_length", "max_gen_toks", "seed", "add_bos_token", "prefix_token_id", "think_end_token")
                raise ConfigError(f"model_args: tandem takes no {name}.{nearest(name, (*known, *settings))}")
        if device is not None and torch.cuda.is_available():  # lm-eval's command line asks for cuda unless told
            more = {"model.device": device.partition(":")[0], **more}
        config = override(config, more)
        self.parts = build_parts(config.model, config.engine, learns=False)
        self.engine, self.tokenizer = self.parts.engine, self.parts.tokenizer
        most = self.parts.decoder.spec.max_position - 2  # a window's last token is run, and one is drawn behind it
        if max_length is not None and not 1 <= max_length <= most:
            raise ConfigError(f"model_args: max_length is {max_length}. Allowed: 1 to {most} with this model.")
        self.max_length, self.max_gen_toks, self.seed = max_length or most, max_gen_toks, seed
        self.source = config.model.source

    @property
    def eot_token_id(self) -> int:
        """The tokeniser's end of text."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(f"{self.tokenizer.origin} names no eos token. Put one into its tokenizer_config.json.")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of the tokeniser, in lm-eval's caches."""
        return self.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, with the tokeniser's own special tokens unless that is said or `string` begins with the prefix token."""
        if add_special_tokens is None:
            spelt = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not spelt and self.add_bos_token is not False
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation by the model's template; without a generation prompt, up to the end of its last message."""
        messages = [Message(one["role"], one["content"]) for one in chat_history]
        text = self.tokenizer.render_text(messages, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = messages[-1].content.strip()
        place = text.rindex(last) if last in text else -1
        if place < 0:
            raise ConfigError("the chat template respells the last message, so an answer can't go on from it.")
        return text[: place + len(last)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in windows of `max_length`, nats; tokens of a text without any give 0."""
        windows: list[Pair] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        found: list[list[float]] = [[] for _ in requests]
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            found[owner].append(logprob)
        totals = [math.fsum(logprobs) for logprobs in found]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its `until`."""
        asked = [self._generation(place, *request.args) for place, request in enumerate(requests)]
        texts: list[str] = []
        for completion in self._run([one for one, _ in asked], "generate_until", disable_tqdm):
            place = len(texts)
            text = self.tokenizer.decode(completion.tokens, skip_special_tokens=True)
            texts.append(postprocess_generated_text(text, asked[place][1], self.think_end_token))
            self.cache_hook.add_partial("generate_until", requests[place].args, texts[-1])
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results: how many weights, of which dtype, and what they hash to."""
        plan = self.parts.plan
        return {"model_num_parameters": plan["parameters"], "model_dtype": str(self.parts.decoder.dtype)} | {
            "model_sha": plan["weights"]
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(Sum of the log-probs of the tokens to be scored, nats; whether each is the likeliest in its place)."""
        asked = []
        for place, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"request {place + 1} has {len(continuation)} tokens to be scored behind {len(context)}. Allowed: "
                    f"1 to max_length, which is {self.max_length}, behind 1 or more."
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) :])
            name = f"loglikelihood {place + 1}"
            sampling = Sampling(temperature=0.0, max_new_tokens=1)
            asked.append(Request(name, name, tokens, sampling, seed=0, likely=1, scored=True))
        found: list[tuple[float, bool]] = []
        for completion in self._run(asked, "loglikelihood", disable_tqdm):
            texts, _, continuation = requests[len(found)]
            assert completion.prompt is not None
            scored = completion.prompt.slice(len(completion.prompt) - len(continuation))
            likeliest = [likely_tokens(one)[0][0] for one in scored["likely"].tolist()]
            found.append((math.fsum(scored["logprobs"].tolist()), likeliest == continuation))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def _generation(self, place: int, context: str, kwargs: dict[str, Any]) -> tuple[Request, list[str]]:
        """A request, and the texts before which its answer ends."""
        given = dict(normalize_gen_kwargs(kwargs, self.max_gen_toks))
        until = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        new, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        temperature = float(given.pop("temperature", 0.0)) * bool(sampled)
        narrowed = {name: kind(given.pop(name)) for name, kind in SAMPLED.items() if given.get(name) is not None}
        if left := [name for name in given if name not in SAMPLED]:
            allowed = ("until", "max_gen_toks", "do_sample", "temperature", *SAMPLED)
            raise ConfigError(f"gen_kwargs: tandem takes no {left[0]}.{nearest(left[0], allowed)}")
        room = self.max_length - new
        if room < 1:
            raise ConfigError(
                f"gen_kwargs: max_gen_toks is {new}, which leaves no room for a context in a max_length of "
                f"{self.max_length}. Lower it."
            )
        drawn = RolloutConfig(
            temperature=temperature,
            max_new_tokens=new,
            stop_strings=tuple(filter(None, until)),
            **(narrowed if temperature else {}),
        )
        name = f"generate_until {place + 1}"
        tokens = tuple(self.tok_encode(context)[-room:])
        seed = derive_seed(self.seed, 0, str(place), 0)
        return Request(name, name, tokens, drawn.sampling(self.parts.renderer.stop_token_ids), seed=seed), until

    def _run(self, requests: Sequence[Request], what: str, quiet: bool) -> Iterator[Completion]:
        """Completions in order. CapacityError, before any runs, where one does not fit; EngineError where one fails."""
        for request in requests:
            self.engine.check(request)
        with self.parts.memory.foreseen(), tqdm(total=len(requests), desc=what, disable=quiet) as bar:
            for request, completion in in_order(self.engine, iter(requests)):
                if completion.failure:
                    raise EngineError(f"{request.id} failed: {completion.failure}")
                bar.update()
                yield completion


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
