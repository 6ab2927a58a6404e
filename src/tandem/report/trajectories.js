"use strict";
// A run's programs, read turn by turn. The page's address says what is shown, behind the #: step, reward, tokens,
// outcome, prompt, search, color, program. What a model wrote becomes text nodes and never HTML.

const COLORS = { mask: "loss mask", logprob: "log-prob", advantage: "advantage", none: "nothing" };
const FIELDS = ["step", "reward", "tokens", "outcome", "prompt", "search"];
const RAREST = 6; // nats: a token of this log-prob or a lower one has the full colour
const GROUPS = 200; // prompts in the list, until more are asked for

const $ = (id) => document.getElementById(id);
const state = { step: "", reward: "", tokens: "", outcome: "", prompt: "", search: "", color: "mask", program: "" };
const opened = new Map(); // step -> its rows
let index, programs = [], matching = [], listed = GROUPS, searches = 0;

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

async function inflate(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (one) => one.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

async function rowsOf(step) {
  if (!opened.has(step)) opened.set(step, await inflate(`block-${step}`));
  return opened.get(step);
}

const decimal = (value, digits = 3) => (value == null ? "–" : String(Number(value.toFixed(digits))).replace("-", "−"));

// "0.5..1", "..1", "2.." or "3" -> [low, high]; null where it is none of these.
function range(text) {
  if (!text.trim()) return [-Infinity, Infinity];
  const parts = text.split("..").map((part) => part.trim());
  const [low, high] = parts.length === 1 ? [parts[0], parts[0]] : parts;
  const numbers = [low === "" ? -Infinity : Number(low), high === "" ? Infinity : Number(high)];
  return parts.length > 2 || numbers.some(Number.isNaN) ? null : numbers;
}

// ---- which programs

function matcher() {
  const asked = {};
  for (const name of ["step", "reward", "tokens"]) {
    const found = range(state[name]);
    $(name).classList.toggle("wrong", !found);
    asked[name] = found ?? [-Infinity, Infinity];
  }
  const within = (value, [low, high]) => low <= value && value <= high;
  const words = state.prompt.toLowerCase();
  return (one) =>
    within(one.step, asked.step) &&
    within(one.tokens, asked.tokens) &&
    (!asked.reward.some(Number.isFinite) || (one.reward != null && within(one.reward, asked.reward))) &&
    (state.outcome === "" ||
      (state.outcome === "graded" ? !one.failure : state.outcome === "failed" ? one.failure : one.failure === state.outcome)) &&
    (words === "" || one.prompt.toLowerCase().includes(words) || one.question.toLowerCase().includes(words));
}

const written = (rows) =>
  rows.map((row) => [row.text, row.context ?? "", ...(row.prompt ?? []).map((m) => m.content), row.answer ?? ""].join("\n"));

async function apply() {
  const search = ++searches; // a later one ends this one
  matching = programs.filter(matcher());
  if (state.search) {
    const words = state.search.toLowerCase(), found = [];
    for (const step of new Set(matching.map((one) => one.step))) {
      $("count").textContent = `searching step ${step} …`;
      const rows = await rowsOf(step);
      if (search !== searches) return;
      const of = matching.filter((one) => one.step === step);
      found.push(...of.filter((one) => written(rows.slice(one.first, one.first + one.rows)).join("\n").toLowerCase().includes(words)));
    }
    matching = found;
  }
  listed = GROUPS;
  if (!matching.some((one) => one.id === state.program)) state.program = matching[0]?.id ?? "";
  showList();
  await showProgram();
  remember();
  document.body.dataset.ready = String(search);
}

function remember() {
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== "") said.set(name, value);
  history.replaceState(null, "", `#${said}`);
  for (const name of FIELDS) if ($(name).value !== state[name]) $(name).value = state[name];
  for (const button of $("colors").children) button.ariaPressed = String(button.value === state.color);
  $("reader").dataset.color = state.color;
}

function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(state)) state[name] = said.get(name) ?? "";
  if (!location.hash) state.step = String(index.steps.at(-1));
  if (!(state.color in COLORS)) state.color = "mask";
}

// ---- the list

function showList() {
  const inSteps = programs.filter(((range_) => (one) => range_[0] <= one.step && one.step <= range_[1])(range(state.step) ?? [-Infinity, Infinity]));
  const graded = matching.filter((one) => one.reward != null);
  const mean = graded.reduce((sum, one) => sum + one.reward, 0) / graded.length;
  $("count").textContent = `${matching.length} of ${inSteps.length} programs` + (graded.length ? `, mean reward ${decimal(mean)}` : "");
  const groups = [];
  for (const one of matching) {
    const last = groups.at(-1);
    if (last && last[0].step === one.step && last[0].prompt === one.prompt) last.push(one);
    else groups.push([one]);
  }
  $("list").replaceChildren();
  let step = null;
  for (const group of groups.slice(0, listed)) {
    if (group[0].step !== step) $("list").append(element("h2", "", `step ${(step = group[0].step)}`));
    const chips = element("div", "chips", ...group.map(chip));
    $("list").append(element("section", "asked", element("p", "", group[0].question || group[0].prompt), chips));
  }
  if (groups.length > listed) {
    const more = element("button", "", `${groups.length - listed} more prompts`);
    more.onclick = () => { listed += GROUPS; showList(); };
    $("list").append(more);
  }
}

function chip(one) {
  const made = element("button", one.failure ? "chip failed" : "chip", one.failure ? "✕" : one.side ?? decimal(one.reward, 2));
  made.type = "button";
  made.title = `${one.id}\n${one.failure || one.side || `reward ${one.reward ?? "–"}`}, ${one.tokens} tokens`;
  made.dataset.program = one.id;
  made.style.setProperty("--reward", one.side ? Number(one.side === "chosen") : share(one.reward));
  made.ariaCurrent = String(one.id === state.program);
  made.onclick = () => open(one);
  return made;
}

// A reward's place between the run's lowest and highest.
function share(reward) {
  const [low, high] = index.rewards;
  return reward == null ? 0 : high > low ? (reward - low) / (high - low) : 0;
}

// ---- one program

async function open(one) {
  state.program = one.id;
  for (const each of document.querySelectorAll(".chip")) each.ariaCurrent = String(each.dataset.program === one.id);
  document.querySelector('.chip[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  await showProgram();
  remember();
}

async function showProgram() {
  const one = programs.find((each) => each.id === state.program), reader = $("reader");
  $("token").textContent = "";
  if (!one) return reader.replaceChildren(element("p", "soft", "No program is like that. Clear a filter to see some."));
  const all = await rowsOf(one.step);
  if (one.id !== state.program) return;
  const rows = all.slice(one.first, one.first + one.rows), row = rows[0], most = largestCredit(all);
  const siblings = programs.filter((each) => each.step === one.step && each.prompt === one.prompt);
  const head = element("div", "head", element("b", "", row.failure ? "failed" : row.side ?? decimal(row.reward)), element("code", "", one.id));
  const words = [`step ${one.step}`, `sibling ${siblings.indexOf(one) + 1} of ${siblings.length}`, `${one.tokens} sampled tokens`];
  const turns = rows.reduce((sum, each) => sum + (each.tokens ? each.tokens.sampled.filter((_, place) => place % 2).length : 0), 0);
  if (turns > 1) words.push(`${turns} turns`);
  for (const [name, count] of Object.entries(row.counts ?? {})) if (count) words.push(`${count} ${(count === 1 ? name.replace(/s$/, "") : name).replaceAll("_", " ")}`);
  const last = rows.at(-1).stop_reason;
  if (last) words.push(`ended by ${last.replaceAll("_", " ")}`);
  if (row.answer != null) words.push(`expected ${row.answer}`);
  reader.replaceChildren(head, element("div", "words", ...words.map((each) => element("span", "", each))));
  if (row.failure) reader.append(element("div", "failure", `${row.failure.where}: ${row.failure.reason}`));
  reader.append(legend(rows, most), element("div", "segments", ...rows.map((each) => segment(each, rows, most))));
  reader.scrollTop = 0;
}

// The size of a step's largest advantage: programs of a step are coloured by one scale.
const largestCredit = (all) =>
  all.flatMap((row) => (row.advantages ?? []).filter((_, place) => place % 2 === 0)).reduce((most, one) => Math.max(most, Math.abs(one)), 0);

function segment(row, rows, most) {
  const made = element("section");
  if (rows.length > 1) {
    const why = row.cause ? `: ${row.cause.replaceAll("_", " ")}` : "";
    made.append(element("h3", "", `segment ${rows.indexOf(row) + 1} of ${rows.length}${why}`));
  }
  const told = row.context ?? (row.prompt ?? []).map((message) => `${message.role}: ${message.content}`).join("\n\n");
  const spans = row.tokens ? tokensOf(row, most) : null;
  const prompt = element("details", "turn other");
  prompt.open = true;
  const before = spans ? spans.slice(0, row.tokens.sampled[0] ?? spans.length) : null;
  prompt.append(
    element("summary", "", row.segment ? "context" : "prompt", spans ? ` · ${before.length} tokens` : ""),
    element("div", "text", ...(spans ? before.map((one) => one.span) : [told])));
  made.append(prompt);
  if (!spans) {
    made.append(element("div", "turn", element("div", "who", element("b", "", "what followed"), "its tokens were not kept"), element("div", "text", row.text)));
    return made;
  }
  const said = [...(row.said ?? [])];
  let at = before.length;
  for (const [place, length] of row.tokens.sampled.slice(1).entries()) {
    const part = spans.slice(at, (at += length)), model = place % 2 === 0;
    if (length) made.append(turn(part, model, speakers(said, model)));
  }
  return made;
}

// An assistant's message that the environment said has `sampled: false`.
const isTurn = (message) => message?.role === "assistant" && message.sampled !== false;

// Who spoke a run of tokens: the model's next message, or all up to it.
function speakers(said, model) {
  if (model) return isTurn(said[0]) ? [said.shift()] : [{ role: "assistant" }];
  const end = said.findIndex(isTurn);
  const found = said.splice(0, end < 0 ? said.length : end);
  return found.length ? found : [{ role: "environment" }];
}

function turn(part, model, messages) {
  const names = messages.map((message) => (message.name ? `${message.role} ${message.name}` : message.role)).join(", ");
  const who = element("div", "who", element("b", "", names), element("span", "", `${part.length} tokens`));
  if (model) {
    const known = part.filter((one) => one.logprob != null);
    const mean = known.reduce((sum, one) => sum + one.logprob, 0) / known.length;
    if (known.length) who.append(element("span", "", `mean log-prob ${decimal(mean)}`));
    const credits = [...new Set(part.map((one) => one.advantage).filter((value) => value != null))];
    if (credits.length === 1) who.append(element("span", "", `advantage ${decimal(credits[0])}`));
    if (messages[0].reward) who.append(element("span", "", `reward of the turn ${decimal(messages[0].reward)}`));
  }
  const made = element("div", model ? "turn" : "turn other", who);
  for (const call of messages.flatMap((message) => message.tool_calls ?? [])) {
    const given = Object.entries(call.function?.arguments ?? {}).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
    made.append(element("div", "call", element("code", "", `${call.function?.name}(${given.join(", ")})`)));
  }
  for (const fault of messages.flatMap((message) => message.faults ?? [])) made.append(element("div", "call fault", fault));
  made.append(element("div", "text", ...part.map((one) => one.span)));
  return made;
}

// The tokens of a row: their text, what is known of them and a span that shows it.
function tokensOf(row, most) {
  const { ids, chars, sampled, logprobs, versions } = row.tokens;
  const characters = Array.from((row.context ?? "") + row.text); // counted as Python does: by code point
  const version = unrolled(versions), advantage = unrolled(row.advantages);
  const drawn = sampled.flatMap((length, place) => Array(length).fill(place % 2 === 1));
  let at = 0, number = -1;
  return ids.map((id, position) => {
    const text = characters.slice(at, (at += chars[position])).join("");
    const one = { id, position, text };
    const classes = ["t"];
    if (drawn[position]) {
      number += 1;
      one.logprob = logprobs?.[number];
      one.version = version[number];
      one.advantage = advantage[number];
      classes.push("sampled", one.advantage > 0 ? "up" : one.advantage < 0 ? "down" : "untrained");
    }
    if (text === "") classes.push("part");
    if (/^\n+$/.test(text)) classes.push("line");
    if (/^<[|/]?[\w|]+\|?>$|^\[\/?[A-Z_]+\]$/.test(text)) classes.push("control");
    one.span = element("span", classes.join(" "), text);
    if (one.logprob != null) one.span.style.setProperty("--rarity", Math.min(1, -one.logprob / RAREST).toFixed(3));
    if (one.advantage) one.span.style.setProperty("--size", (Math.abs(one.advantage) / most).toFixed(3));
    one.span.onmouseenter = () => describe(one);
    return one;
  });
}

// [value, count, value, count] -> the values, one a token.
const unrolled = (runs) => (runs ?? []).flatMap((value, place) => (place % 2 ? [] : Array(runs[place + 1]).fill(value)));

function describe(one) {
  const known = [`token ${one.position} ${JSON.stringify(one.text)}`, `id ${one.id}`];
  if (one.version == null) known.push("not in the loss");
  else {
    if (one.logprob != null) known.push(`log-prob ${decimal(one.logprob)} (p ${decimal(Math.exp(one.logprob))})`);
    known.push(one.advantage == null ? "not trained" : `advantage ${decimal(one.advantage)}`, `weights of step ${one.version}`);
  }
  $("token").textContent = known.join("   ");
}

function legend(rows, most) {
  const made = element("div", "legend"), bar = (colors) => {
    const one = element("i");
    one.style.background = `linear-gradient(to right, ${colors})`;
    return one;
  };
  if (!rows.some((row) => row.tokens)) made.append("Tokens were not kept (rollout.keep_tokens), or by an older version: the text has no colours.");
  else if (state.color === "mask") made.append(bar("color-mix(in srgb, var(--mask) 24%, transparent) 0 100%"), "sampled by the policy: in the loss. All else is what it read");
  else if (state.color === "logprob") made.append("sure", bar("transparent, color-mix(in srgb, var(--rare) 62%, transparent)"), `rare: log-prob −${RAREST} or less`);
  else if (state.color === "advantage") {
    made.append(`less likely${most ? ` (−${decimal(most)})` : ""}`, bar("color-mix(in srgb, var(--down) 52%, transparent), transparent, color-mix(in srgb, var(--up) 52%, transparent)"), `more likely${most ? ` (${decimal(most)})` : ""}`);
    if (!rows.some((row) => row.advantages)) made.append("· not trained: its advantage is 0, it failed, or it was left out");
  }
  return made;
}

// ---- hands

function color(name) {
  state.color = name;
  const one = programs.find((each) => each.id === state.program), all = one ? opened.get(one.step) : [];
  document.querySelector(".legend")?.replaceWith(legend(all.slice(one?.first, one?.first + one?.rows), largestCredit(all)));
  remember();
}

// The program `by` places on, or the first one of another prompt in that direction.
function go(by, otherPrompt = false) {
  let place = matching.findIndex((one) => one.id === state.program);
  const from = matching[place];
  do place += by;
  while (otherPrompt && matching[place]?.prompt === from?.prompt && matching[place]?.step === from?.step);
  if (matching[place]) open(matching[place]);
}

function goStep(by) {
  const [low, high] = range(state.step) ?? [NaN, NaN];
  const now = index.steps.findIndex((step) => step >= (low === high ? low : Infinity));
  const place = now < 0 ? (by < 0 ? index.steps.length - 1 : 0) : now + by;
  if (!(place in index.steps)) return;
  state.step = String(index.steps[place]);
  apply();
}

const KEYS = {
  j: () => go(1), k: () => go(-1), n: () => go(1, true), p: () => go(-1, true),
  "[": () => goStep(-1), "]": () => goStep(1), "/": () => $("search").focus(),
  c: () => color(Object.keys(COLORS)[(Object.keys(COLORS).indexOf(state.color) + 1) % Object.keys(COLORS).length]),
  x: () => document.querySelectorAll("details.turn").forEach((one) => (one.open = !one.open)),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select");
  if (event.key === "Escape" && typing) $("reader").focus();
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

async function start() {
  index = await inflate("index");
  programs = index.programs.map(([step, prompt, id, reward, failure, tokens, first, rows, side]) => ({
    step: index.steps[step], prompt: index.prompts[prompt][0], question: index.prompts[prompt][1], id, reward,
    failure: index.failures[failure] ?? "", tokens, first, rows, side,
  }));
  const rewards = programs.map((one) => one.reward).filter((reward) => reward != null);
  index.rewards = [Math.min(...rewards, 0), Math.max(...rewards, 0)];
  for (const [value, text] of [["", "all"], ["graded", "graded"], ["failed", "failed"], ...index.failures.map((why) => [why, why])])
    $("outcome").append(new Option(text, value));
  for (const [value, text] of Object.entries(COLORS)) {
    const button = element("button", "", text);
    button.type = "button";
    button.value = value;
    button.onclick = () => color(value);
    $("colors").append(button);
  }
  for (const name of FIELDS) $(name).oninput = () => { state[name] = $(name).value; apply(); };
  $("filters").onsubmit = (event) => event.preventDefault();
  $("earlier").onclick = () => goStep(-1);
  $("later").onclick = () => goStep(1);
  window.onhashchange = () => { recall(); apply(); };
  recall();
  await apply();
}

start();
