// The page of the forecasts: asks the server over its HTTP interface and draws the answers. No build, no library.
// What a server says is only ever text here: it enters the document as text nodes, never as markup.

const ROOT = new URL("..", import.meta.url); // of the server, whatever its prefix
const REFRESH = 60_000;
const RETRY = 10_000;
const PATIENCE = 30_000;
const DEBOUNCE = 200;
const PAGE = 20; // names that a search lists at a time
const PASSING = { shown: 10, most: 1000 }; // entities that pass a limit
const LISTED = 25; // neighbours before "more"
const DRAWN = 7; // neighbours on each side of the drawing
const CERTAIN = 0.95;
const TOKEN = "fleetcast-token";

const $ = (id) => document.getElementById(id);
const state = { cluster: null, metric: null, limits: new Map(), entity: null, shown: undefined };

// -- making elements ------------------------------------------------------------------------------------------

function grow(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value == null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}
const h = (tag, attributes = {}, ...children) => grow(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) =>
  grow(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const address = (entity) => "#" + encodeURIComponent(entity);
const link = (entity) => h("a", { href: address(entity) }, entity);

const drawn = new WeakMap();
/** Renews what is in an element, only if `key`, all that it is made of, has changed. Focus stays. */
function fill(node, key, make) {
  key = JSON.stringify(key);
  if (drawn.get(node) === key) return;
  drawn.set(node, key);
  const held = node.contains(document.activeElement) && document.activeElement.getAttribute("href");
  node.replaceChildren(...[make()].flat().filter((child) => child != null && child !== false));
  if (held) [...node.querySelectorAll("a")].find((a) => a.getAttribute("href") === held)?.focus({ preventScroll: true });
}
const empty = (...nodes) => nodes.forEach((node) => fill(node, null, () => []));

function table(head, rows, options = {}) {
  const kinds = head.map(([, kind]) => kind);
  const cells = (tag, row) => row.map((cell, i) => h(tag, { class: kinds[i], scope: tag === "th" && "col" }, cell));
  return h("table", { class: options.class },
    h("thead", {}, h("tr", {}, cells("th", head.map(([title]) => title)))),
    h("tbody", {}, rows.map((row, i) => h("tr", { class: options.row?.(i) }, cells("td", row)))));
}

// -- figures and times in words -------------------------------------------------------------------------------

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const three = new Intl.NumberFormat("en", { maximumSignificantDigits: 3, minimumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { maximumFractionDigits: 1, minimumFractionDigits: 1 });

/** Three significant digits, thousands separated; – where there is none. */
function number(value) {
  if (!isNumber(value)) return "–";
  if (value === 0 || Math.abs(value) >= 999.5) return whole.format(value);
  return Math.abs(value) < 1e-4 ? value.toExponential(2) : three.format(value);
}
const percent = (value) => (isNumber(value) ? `${tenth.format(value * 100)}\u00a0%` : "–");
const isFraction = (unit) => /fraction of capacity/.test(unit ?? "");
const writer = (unit) => (isFraction(unit) ? percent : number);
const level = (p) => `${+(p * 100).toFixed(2)}\u00a0%`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const count = (n, one, many = one + "s") => `${whole.format(n)} ${n === 1 ? one : many}`;

/** Milliseconds of a time in an answer; one without a zone is UTC as well. */
const at = (text) => Date.parse(/(Z|[+-]\d\d:?\d\d)$/.test(text) ? text : text + "Z");
const clock = (ms) => new Date(ms).toISOString().slice(11, ms % 60_000 ? 19 : 16);
const moment = (ms) => new Date(ms).toISOString().slice(0, 16).replace("T", " ");
/** A time in an answer, as a text that does not break. */
const utc = (text) => h("span", { class: "whole" }, `${moment(at(text))} UTC`);
const weekday = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short", timeZone: "UTC" });
const day = (ms) => weekday.format(ms).replace(",", "");
/** The same for a narrow column. */
const stamp = (text) => {
  const [name, ...date] = day(at(text)).split(" ");
  return [h("span", { class: "spare" }, `${name} `), `${date.join(" ")} ${clock(at(text))}`];
};
const DAY = 86_400_000;
/** "today", "tomorrow", or the date. */
const when = (ms) => ({ 0: "today", 1: "tomorrow" })[Math.floor(ms / DAY) - Math.floor(Date.now() / DAY)] ?? `on ${day(ms)}`;

function duration(seconds) {
  for (const [size, unit] of [[86_400, "days"], [3600, "h"], [60, "min"]])
    if (seconds >= (unit === "days" ? 2 * size + 1 : size)) return `${+(seconds / size).toFixed(1)} ${unit}`;
  return `${+seconds.toFixed(1)} s`;
}

// -- asking the server ----------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
  /** Whether the server as a whole cannot answer, rather than this one question. */
  get general() {
    return [0, 401, 502, 503, 504].includes(this.status);
  }
}

async function ask(path, signal, parameters = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(parameters)) if (value !== "") url.searchParams.set(name, value);
  const token = sessionStorage.getItem(TOKEN);
  const patience = AbortSignal.timeout(PATIENCE);
  let response;
  let body = null;
  try {
    response = await fetch(url, {
      headers: token ? { Authorization: `Bearer ${token}` } : {},
      signal: AbortSignal.any([signal, patience]),
      cache: "no-cache",
    });
    body = await response.json().catch((error) => (error instanceof SyntaxError ? null : Promise.reject(error)));
  } catch (error) {
    if (signal.aborted) throw error;
    const late = patience.aborted ? ` within ${PATIENCE / 1000} s` : "";
    throw new Refused(0, late ? `The server does not answer${late}.` : "The server cannot be reached.");
  }
  if (response.ok && body) return body;
  const why = typeof body?.error === "string" ? body.error : `The server answered ${response.status} ${response.statusText}`.trim();
  throw new Refused(response.status, typeof body?.field === "string" && !why.includes(body.field) ? `${body.field}: ${why}` : why);
}
const about = (what, entity) => `v1/${what}/${encodeURIComponent(entity)}`;

/** What became of several questions; a trouble of the whole server is thrown. */
async function all(...questions) {
  const answers = await Promise.allSettled(questions);
  const general = answers.find((answer) => answer.reason && !(answer.reason instanceof Refused && !answer.reason.general));
  if (general) throw general.reason;
  return answers.map((answer) => answer.value ?? answer.reason);
}
const refusal = (error) => h("p", { class: "warning", role: "alert" }, error.message);

// -- what goes on ---------------------------------------------------------------------------------------------

let work = new AbortController();
let timer;

function chosenEntity() {
  const text = location.hash.slice(1);
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Asks for all that the page shows now, shows it, and comes again. */
async function refresh() {
  clearTimeout(timer);
  work.abort();
  work = new AbortController();
  const { signal } = work;
  let pause = REFRESH;
  try {
    const cluster = await ask("v1/cluster", signal);
    announce(state.cluster, cluster);
    state.cluster = cluster;
    $("page-token").hidden = true;
    showMetrics(cluster);
    await (state.entity ? showEntity(state.entity, signal) : showCluster(cluster, signal));
    if (signal.aborted) return;
    empty($("page-problem"));
    $("page-fresh").textContent = `Last asked at ${new Date().toISOString().slice(11, 19)}; asked again every ${REFRESH / 1000} s.`;
    arrive();
  } catch (error) {
    if (signal.aborted) return;
    if (!(error instanceof Refused)) console.error(error);
    pause = trouble(error);
  }
  settle();
  if (pause < Infinity) timer = setTimeout(refresh, pause);
}

/** Says why there is nothing new, and returns when to try again [ms]; never by itself without a token. */
function trouble(error) {
  if (state.shown !== state.entity) $("page-cluster").hidden = $("page-entity").hidden = true;
  const needsToken = error.status === 401;
  $("page-token").hidden = !needsToken;
  if (needsToken) {
    empty($("page-problem"));
    $("page-token-why").textContent = sessionStorage.getItem(TOKEN)
      ? `The token was not accepted: ${error.message}`
      : `This server asks for a token: ${error.message}`;
    $("page-token-value").focus();
    return Infinity;
  }
  const general = error.general ?? false;
  const known = error instanceof Refused ? error.message : "This page could not show the answer.";
  const message = error.status === 503 ? `There is no forecast to show: ${known}` : known;
  fill($("page-problem"), message, () => h("div", { class: "warning" }, h("p", {}, message),
    h("p", { class: "quiet" }, general ? `Trying again every ${RETRY / 1000} seconds.` : "Trying again in a minute.")));
  return general ? RETRY : REFRESH;
}

function announce(before, now) {
  if (!before || before.issued === now.issued) return;
  const text = `A new forecast, issued ${moment(at(now.issued))} UTC, has replaced the one of ${moment(at(before.issued))} UTC.`;
  const close = h("button", { type: "button", onclick: () => empty($("page-news")) }, "Close");
  fill($("page-news"), text, () => h("div", { class: "news" }, h("p", {}, text), close));
}

function showMetrics(cluster) {
  const names = cluster.metrics.map((metric) => metric.name);
  if (!names.includes(state.metric)) {
    const wanted = new URLSearchParams(location.search).get("metric");
    state.metric = names.includes(wanted) ? wanted : names[0];
  }
  const select = $("page-metric");
  $("page-finder").hidden = $("page-choice").hidden = false;
  fill(select, names, () => names.map((name) => h("option", { value: name }, name)));
  select.value = state.metric;
}

/** Turns to what the address names; `focus` where a person went there. */
let moved = false;
function turn(focus) {
  state.entity = chosenEntity() || null;
  moved = focus;
  closeResults();
  $("page-search").value = "";
  document.querySelector("main").setAttribute("aria-busy", "true");
  refresh();
}
/** Lets the cluster or the entity be seen; what was there before stays until then. */
function reveal() {
  $("page-cluster").hidden = state.entity != null;
  $("page-entity").hidden = state.entity == null;
  state.shown = state.entity;
  settle();
}
function settle() {
  $("page-loading").hidden = true;
  document.querySelector("main").setAttribute("aria-busy", "false");
}
function arrive() {
  document.title = state.entity ? `${state.entity} – load forecast` : "Load forecast";
  if (!moved) return;
  moved = false;
  scrollTo(0, 0);
  document.querySelector("main > div:not([hidden]) h1")?.focus({ preventScroll: true });
}

// -- the whole cluster ----------------------------------------------------------------------------------------

async function showCluster(cluster, signal) {
  const { metric } = state;
  const [total, peaks] = await all(
    ask("v1/totals", signal, { metric }), ask("v1/peaks", signal, { metric, quantile: CERTAIN, limit: 10 }));
  const kinds = cluster.level + (cluster.entities === 1 ? "" : "s");
  const span = duration(cluster.step * cluster.horizon);
  const substitutes = Object.values(cluster.fallbacks).reduce((sum, n) => sum + n, 0);
  const unit = cluster.metrics.find((one) => one.name === metric).unit;

  fill($("cluster-head"), cluster, () => [
    h("h1", { tabindex: -1 }, "Load forecast of ", utc(cluster.issued)),
    h("p", { class: "quiet" }, `${whole.format(cluster.entities)} ${kinds}, ${span} ahead in steps of ${duration(cluster.step)}, by ${cluster.model}.`),
    stale(cluster)]);
  fill($("cluster-facts"), cluster, () => [
    ["Model", cluster.model],
    ["Issued", utc(cluster.issued)],
    ["Valid until", utc(cluster.valid_until)],
    [capital(kinds), whole.format(cluster.entities)],
    ["Naive instead of the model’s", substitutes ? whole.format(substitutes) : "none"],
  ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  $("cluster-fallbacks").hidden = !substitutes;
  fill($("cluster-reasons"), cluster.fallbacks, () =>
    table([["Reason"], [kinds, "figure"]], Object.entries(cluster.fallbacks).map(([why, n]) => [why, whole.format(n)])));

  reveal(); // charts need a width
  if (total instanceof Refused) {
    empty($("cluster-verdict"));
    fill($("total-note"), total.message, () => refusal(total));
    $("total-chart").hidden = true;
  } else {
    $("total-chart").hidden = false;
    const forecast = asForecast(total);
    const step = cluster.step * 1000;
    const first = forecast.times[0] - step * total.history.length;
    const history = total.history.map((value, i) => [first + step * i, value]);
    fill($("cluster-verdict"), [peakWords(metric, forecast, step), total], () => h("p", { class: "verdict" },
      peakWords(metric, forecast, step), share(total, forecast, cluster, step)));
    fill($("total-note"), total.how, () => h("p", { class: "quiet" },
      `${sentence(total.how)} Shaded: the intervals in which it lies 50\u00a0% and 90\u00a0% of the time.`));
    charts.total.show({ title: `${metric}: ${total.unit}`, history, ...forecast });
  }

  if (peaks instanceof Refused) fill($("peaks"), peaks.message, () => refusal(peaks));
  else fill($("peaks"), [peaks, unit], () => showPeaks(peaks, unit, cluster));
  state.highest = peaks.peaks?.[0];
  await showLimits(signal);
}

const sentence = (text) => (/[.!?]$/.test(text.trim()) ? text : `${text}.`);

function stale(issue) {
  return issue.stale && h("p", { class: "warning" },
    "This forecast is stale: it ended at ", utc(issue.valid_until), " and says nothing of now.");
}

/** Times and intervals of an answer with `times`, `mean` and `quantiles`, ready to draw. */
function asForecast({ times, mean, quantiles, unit }, shared = {}) {
  const levels = Object.entries(quantiles).map(([name, values]) => [+name, values]);
  const of = (p) => levels.find(([q]) => Math.abs(q - p) < 1e-6)?.[1];
  const bands = [["90\u00a0%", 0.05, 0.95], ["50\u00a0%", 0.25, 0.75]]
    .map(([name, low, high]) => ({ name, low: of(low), high: of(high) }))
    .filter(({ low, high }) => low && high);
  return { times: (times ?? shared.times).map(at), mean, bands, certain: of(CERTAIN), unit };
}

/** The step where the mean is highest, of those that are not over; of all if all are. */
function peak({ times, mean }, step) {
  const now = Date.now();
  const open = times.at(-1) + step > now && times[0] <= now ? (i) => times[i] + step > now : () => true;
  return mean.reduce((best, value, i) => (open(i) && (best < 0 || value > mean[best]) ? i : best), -1);
}

function peakWords(metric, forecast, step) {
  const i = peak(forecast, step);
  if (i < 0) return "No step is forecast.";
  const time = forecast.times[i];
  const format = writer(forecast.unit);
  const word = when(time);
  const whose = word.startsWith("on ") ? "The" : `${capital(word)}’s`;
  const place = `${word.startsWith("on ") ? `${word} ` : ""}at ${clock(time)} UTC`;
  const below = forecast.certain && `below ${format(forecast.certain[i])}`;
  const bound = !below ? ""
    : forecast.certain[i] >= forecast.mean[i] ? `, with ${level(CERTAIN)} certainty ${below} at that time`
      : `; the interval lies lower, with ${level(CERTAIN)} certainty ${below} at that time`;
  return `${whose} expected peak of ${metric} is ${format(forecast.mean[i])} ${place}${bound}.`;
}

/** Of a sum of fractions: what that is on average. */
function share(total, forecast, cluster, step) {
  if (!/one entity's capacity/.test(total.unit) || !total.entities) return "";
  const i = peak(forecast, step);
  return i < 0 ? "" : ` That is ${percent(forecast.mean[i] / total.entities)} of the capacity of ${count(total.entities, cluster.level)}.`;
}

function showPeaks({ peaks, quantile }, unit, cluster) {
  if (!peaks.length) return h("p", {}, "No peak is forecast.");
  const format = writer(unit);
  const most = Math.max(...peaks.map((one) => one.value), 1e-9);
  const bar = ({ mean, value }) => s("svg", { width: 120, height: 10, "aria-hidden": "true" },
    s("rect", { class: "range", width: (120 * value) / most, height: 10, rx: 2 }),
    s("rect", { class: "level", width: (120 * mean) / most, height: 10, rx: 2 }));
  return [
    h("p", { class: "quiet" }, `${capital(unit)}. “${level(quantile)}” is the quantile of that one step: the load stays below it ${+(quantile * 100).toFixed(2)} times in 100.`),
    h("div", { class: "scroll" }, table(
      [[capital(cluster.level)], ["At, UTC", "when"], ["Expected", "figure"], [level(quantile), "figure"], ["", "draw"]],
      peaks.map((one) => [link(one.entity), stamp(one.time), format(one.mean), format(one.value), bar(one)]),
      { class: "wide" })),
  ];
}

let limitWork = new AbortController();
async function showLimits(signal) {
  const { cluster, metric, limits } = state;
  const unit = cluster.metrics.find((one) => one.name === metric).unit;
  const fraction = isFraction(unit);
  const input = $("limit-value");
  const box = $("limits");
  $("limit-unit").textContent = fraction ? ", % of capacity" : `, ${unit.split(", ").at(-1)}`;
  // Where there is no capacity to measure by: four fifths of the highest peak.
  if (!limits.has(metric)) limits.set(metric, fraction ? "80" : String(+(0.8 * (state.highest?.value || 1)).toPrecision(2)));
  if (document.activeElement !== input) input.value = limits.get(metric);
  const limit = Number(limits.get(metric)) / (fraction ? 100 : 1);
  if (!(limit > 0)) return fill(box, "wrong", () => h("p", {}, "Give a limit above 0."));
  const [answer] = await all(ask("v1/limits", signal, { metric, limit, quantile: CERTAIN, most: PASSING.most }));
  if (signal.aborted) return undefined;
  if (answer instanceof Refused) return fill(box, answer.message, () => refusal(answer));
  return fill(box, [answer, unit, state.highest], () => limitRows(answer, unit, cluster));
}

function limitRows(answer, unit, cluster) {
  const format = writer(unit);
  const passing = answer.limits.filter((one) => one.hours != null);
  const { highest } = state;
  const bound = isFraction(unit) ? level(answer.limit) : number(answer.limit);
  const span = duration(answer.horizon_hours * 3600);
  const words = passing.length
    ? `${passing.length < PASSING.most ? "" : "At least "}${count(passing.length, cluster.level)} of ${whole.format(cluster.entities)}, soonest first: here the ${level(answer.quantile)} quantile passes ${bound} within ${span}.`
    : `No ${cluster.level} passes ${bound} within ${span}, by the ${level(answer.quantile)} quantile.`;
  const row = (one) => [link(one.entity), stamp(one.time), one.hours > 0 ? duration(one.hours * 3600) : "now", format(one.highest)];
  const head = [[capital(cluster.level)], ["From, UTC", "when"], ["In", "figure spare"], ["Highest", "figure"]];
  const rows = (part) => h("div", { class: "scroll" }, table(head, part.map(row), { class: "wide" }));
  const rest = passing.slice(PASSING.shown);
  return [
    h("p", { class: "quiet" }, words),
    !passing.length && highest && h("p", {}, "The highest is ", link(highest.entity), `, with ${format(highest.value)}.`),
    passing.length > 0 && rows(passing.slice(0, PASSING.shown)),
    rest.length > 0 && h("details", {}, h("summary", {}, `${whole.format(rest.length)} more`), rows(rest)),
  ];
}

// -- one entity -----------------------------------------------------------------------------------------------

async function showEntity(entity, signal) {
  const [forecasts, history, neighbours, accuracy, details] = await all(
    ask(about("forecasts", entity), signal), ask(about("history", entity), signal),
    ask(about("neighbours", entity), signal), ask(about("accuracy", entity), signal),
    ask(about("entities", entity), signal));
  const { cluster, metric } = state;
  const step = cluster.step * 1000;
  const missing = forecasts instanceof Refused;
  const known = details instanceof Refused ? null : details;
  const series = missing ? null : forecasts.forecasts[0]?.series.find((one) => one.metric === metric);
  const reason = missing ? null : forecasts.forecasts[0]?.fallback;

  fill($("entity-head"), [entity, known, missing ? forecasts.message : null, reason, cluster], () => [
    h("h1", { tabindex: -1 }, entity),
    missing ? refusal(forecasts) : h("p", { class: "quiet" }, describe(known, cluster, forecasts)),
    !missing && stale(cluster),
    reason && h("p", { class: "warning" }, `A naive forecast stands in for that of ${forecasts.model}: ${reason}.`)]);
  $("entity-more").hidden = missing;
  $("entity-chart").hidden = !series;
  reveal(); // charts need a width
  if (missing) return empty($("entity-verdict"), $("neighbours"), $("accuracy"));

  if (series) {
    const forecast = asForecast(series, forecasts);
    const observed = history instanceof Refused ? [] : history.times.map((time, i) => [at(time), history.values[metric]?.[i] ?? null]);
    const words = peakWords(metric, forecast, step);
    const gap = history instanceof Refused ? ` There is no history: ${history.message}` : "";
    fill($("entity-verdict"), words + gap, () => h("p", { class: "verdict" }, words, gap));
    charts.entity.show({ title: `${metric}: ${series.unit}`, history: observed, ...forecast });
  } else fill($("entity-verdict"), metric, () => h("p", { class: "warning" }, `There is no forecast of ${metric}.`));

  if (neighbours instanceof Refused) fill($("neighbours"), neighbours.message, () => refusal(neighbours));
  else fill($("neighbours"), [neighbours, Math.round($("neighbours").clientWidth)], () => showNeighbours(neighbours));
  if (accuracy instanceof Refused) fill($("accuracy"), accuracy.message, () => refusal(accuracy));
  else fill($("accuracy"), [accuracy, metric, cluster.metrics], () => showAccuracy(accuracy, metric, cluster));
  return undefined;
}

function describe(entity, cluster, { model }) {
  const parts = [`A ${cluster.level}`];
  if (entity?.parent) parts.push(`on ${entity.parent}`);
  if (entity?.service) parts.push(`of service ${entity.service}`);
  const capacities = [
    isNumber(entity?.cpu_capacity) && `${+entity.cpu_capacity.toFixed(2)} cores`,
    isNumber(entity?.memory_capacity) && `a normalised memory of ${+entity.memory_capacity.toFixed(3)}`,
  ].filter(Boolean);
  const with_ = capacities.length ? `, with ${capacities.join(" and ")}` : "";
  return [`${parts.join(" ")}${with_}. Forecast of `, utc(cluster.issued), ` by ${model}.`];
}

function showAccuracy({ issued, metrics }, chosen, cluster) {
  if (issued == null) return h("p", {}, "There is no earlier forecast to look at.");
  const names = cluster.metrics.map((one) => one.name).filter((name) => metrics[name]);
  const unit = (name) => cluster.metrics.find((one) => one.name === name).unit;
  const from = ["The forecast issued ", utc(issued), " against what then was observed."];
  if (!names.length) return h("p", {}, from, " Nothing was.");
  const one = metrics[chosen];
  return [
    h("p", { class: "quiet" }, from),
    one && h("p", {}, `${chosen} was off by ${writer(unit(chosen))(one.mean_absolute_error)}${isFraction(unit(chosen)) ? " of capacity" : ""} on average; ${percent(one.inside_90)} of ${count(one.observations, "observation")} lay inside the 90\u00a0% interval.`),
    h("div", { class: "scroll" }, table(
      [["Metric", "when"], ["Mean absolute error", "figure"], ["Inside 90\u00a0%", "figure"], ["Observed", "figure"]],
      names.map((name) => [name, writer(unit(name))(metrics[name].mean_absolute_error), percent(metrics[name].inside_90), whole.format(metrics[name].observations)]),
      { row: (i) => names[i] === chosen && "chosen" })),
  ];
}

// -- the graph around an entity -------------------------------------------------------------------------------

function showNeighbours({ entity, neighbours }) {
  const side = (direction) => neighbours.filter((one) => one.direction === direction).sort((a, b) => b.weight - a.weight);
  const sides = { upstream: side("upstream"), downstream: side("downstream") };
  if (!neighbours.length) return h("p", {}, "The graph has no edge here.");
  const words = { upstream: "Upstream: their load comes here", downstream: "Downstream: its load goes there" };
  const chips = (list) => h("ul", { class: "chips" }, list.map((one) =>
    h("li", {}, link(one.entity), h("span", { class: "quiet" }, ` ${number(one.weight)}`))));
  return [
    h("p", { class: "quiet" }, "The graph at the forecast’s beginning. Figures and the lines’ widths are the edges’ weights."),
    graph(entity, sides, $("neighbours").clientWidth),
    ["upstream", "downstream"].map((name) => [
      h("h3", {}, words[name]),
      sides[name].length ? chips(sides[name].slice(0, LISTED)) : h("p", { class: "quiet" }, "none"),
      sides[name].length > LISTED && h("details", {}, h("summary", {}, `${whole.format(sides[name].length - LISTED)} more`), chips(sides[name].slice(LISTED))),
    ]),
  ].flat(3);
}

/** A drawing for the eye; the links are listed below it for everyone. */
function graph(entity, sides, width) {
  const box = Math.min(170, Math.round(width * 0.27));
  const pitch = 36;
  const most = Math.max(...Object.values(sides).flat().map((one) => one.weight), 1e-9);
  const rows = Math.max(1, ...Object.values(sides).map((list) => Math.min(list.length, DRAWN + 1)));
  const height = rows * pitch;
  const middle = height / 2;
  const short = (name, bold) => {
    const letters = Math.floor((box - 10) / (bold ? 8.4 : 7.3));
    const signs = [...name];
    return signs.length > letters ? signs.slice(0, letters - 1).join("") + "…" : name;
  };
  const node = (x, y, name, kind) => [
    s("title", {}, name),
    s("rect", { class: kind, x, y: y - 13, width: box, height: 26, rx: 5 }),
    s("text", { class: kind, x: x + box / 2, y: y + 4, "text-anchor": "middle" }, short(name, kind === "centre"))];
  const centre = (width - box) / 2;

  const draw = (direction, x, from, to) => {
    const list = sides[direction];
    const shown = list.slice(0, DRAWN);
    const slots = shown.length + (list.length > DRAWN);
    const y = (i) => middle + (i - (slots - 1) / 2) * pitch;
    const bend = (to - from) / 2;
    const [left, right] = direction === "upstream" ? [(i) => y(i), () => middle] : [() => middle, (i) => y(i)];
    return [
      s("g", { class: direction }, shown.map((one, i) => s("path", {
        d: `M${from} ${left(i)}C${from + bend} ${left(i)} ${from + bend} ${right(i)} ${to} ${right(i)}`,
        "stroke-width": 1 + (4 * one.weight) / most, "stroke-opacity": 0.75, "marker-end": `url(#arrow-${direction})`,
      }))),
      shown.map((one, i) => s("a", { href: address(one.entity), tabindex: -1 }, node(x, y(i), one.entity))),
      list.length > DRAWN && s("text", { class: "soft", x: x + box / 2, y: y(DRAWN) + 4, "text-anchor": "middle" }, `${list.length - DRAWN} more`),
    ].flat();
  };
  const arrow = (direction) => s("marker", { id: `arrow-${direction}`, class: direction, viewBox: "0 0 8 8", refX: 1, refY: 4,
    markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" }, s("path", { d: "M0 0L8 4L0 8z" }));
  const tip = 8;
  return s("svg", { class: "graph", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
    s("defs", {}, arrow("upstream"), arrow("downstream")),
    draw("upstream", 0, box, centre - tip), draw("downstream", width - box, centre + box, width - box - tip),
    node(centre, middle, entity, "centre"));
}

// -- charts ---------------------------------------------------------------------------------------------------

const HEIGHT = { narrow: 230, wide: 300 };
const HOUR = 3_600_000;
const STEPS = [1, 5, 10, 30].map((n) => (n * HOUR) / 3600)
  .concat([1, 2, 5, 10, 15, 30].map((n) => (n * HOUR) / 60), [1, 2, 3, 6, 12].map((n) => n * HOUR), [1, 2, 7, 14, 28, 91, 364].map((n) => n * DAY));

function ticks(low, high, most) {
  const rough = (high - low) / most || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((n) => n * power >= rough * 0.999) ?? 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0); // no −0
  return { step, found };
}

/** Tick labels with no more digits than they need. */
function tickWriter(unit, step) {
  const size = isFraction(unit) ? step * 100 : step;
  const digits = Math.max(0, Math.min(12, -Math.floor(Math.log10(size) + 1e-9) + (/^2\.5/.test(size.toExponential()) ? 1 : 0)));
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return isFraction(unit) ? (v) => `${format.format(v * 100)} %` : (v) => format.format(v);
}

/** Observations and a forecast with its intervals, over UTC time; values by pointer, by keys, or as a table. */
class Chart {
  constructor(figure) {
    this.caption = h("figcaption");
    this.legend = h("ul", { class: "legend" });
    this.plot = h("div", { class: "plot", tabindex: 0, role: "slider", "aria-valuemin": 0 });
    this.readout = h("p", { class: "readout quiet" });
    this.values = h("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Values" });
    this.details = h("details", { ontoggle: () => this.list() }, h("summary", {}, "Values as a table"), this.values);
    figure.append(this.caption, this.legend, this.plot, this.readout, this.details);
    this.place = null;
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.move(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.move(null));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /** `history` [[time, value]], `times`, `mean`, `bands` [{name, low, high}] widest first, `unit`, `title`. */
  show(data) {
    if (data.title !== this.data?.title) this.place = null;
    this.data = data;
    this.draw();
    this.list();
  }

  /** As much history as leaves the forecast room to be read. */
  recent(width) {
    const { history, times } = this.data;
    const most = Math.max(24, Math.round(times.length * (width < 560 ? 1.25 : 2.5)));
    return history.slice(-most);
  }

  draw() {
    const width = Math.floor(this.plot.clientWidth);
    if (!this.data || !width) return;
    const { times, mean, bands, unit, title } = this.data;
    const height = width < 560 ? HEIGHT.narrow : HEIGHT.wide;
    const history = this.recent(width);
    this.points = [
      ...history.map(([time, value]) => ({ time, observed: value })),
      ...times.map((time, i) => ({ time, mean: mean[i], intervals: bands.map(({ name, low, high }) => [name, low[i], high[i]]) })),
    ];
    const seen = this.points.flatMap((p) => [p.observed, p.mean, ...(p.intervals ?? []).flatMap(([, a, b]) => [a, b])]).filter(isNumber);
    let low = Math.min(...seen);
    let high = Math.max(...seen);
    if (!seen.length) [low, high] = [0, 1];
    if (low >= 0 && low < 0.6 * high) low = 0;
    if (high <= low) high = low + (Math.abs(low) || 1) * 0.1;
    const { step, found } = ticks(low, high + (high - low) * 0.04, height < 280 ? 4 : 6);
    if (found[0] > low) found.unshift(found[0] - step + 0);
    if (found.at(-1) < high) found.push(found.at(-1) + step);
    [low, high] = [found[0], found.at(-1)];
    const label = tickWriter(unit, step);
    const left = Math.max(...found.map((v) => label(v).length)) * 6.9 + 8;
    const [right, top, bottom] = [14, 20, 24];
    const start = this.points[0]?.time ?? 0;
    const end = Math.max(this.points.at(-1)?.time ?? 1, start + 1);
    const x = (time) => +(left + ((time - start) / (end - start)) * (width - left - right)).toFixed(1);
    const y = (value) => +(top + (1 - (value - low) / (high - low)) * (height - top - bottom)).toFixed(1);
    Object.assign(this, { x, y, floor: height - bottom });

    const path = (list) => list.map(([time, value], i) => {
      if (!isNumber(value)) return "";
      const joined = i > 0 && isNumber(list[i - 1][1]);
      return `${joined ? "L" : "M"}${x(time)} ${y(value)}${joined || isNumber(list[i + 1]?.[1]) ? "" : "h0"}`; // h0: a dot
    }).join("");
    const band = ({ low: a, high: b }) => {
      const there = times.map((time, i) => `${x(time)} ${y(b[i])}`);
      const back = times.map((time, i) => `${x(time)} ${y(a[i])}`).reverse();
      return s("path", { class: "band", d: `M${[...there, ...back].join("L")}z` });
    };
    const begin = times.length ? x(times[0]) : null;
    const now = Date.now();
    const passing = now > start && now < end;
    const close = passing && begin != null && x(now) > begin && x(now) - begin < 64;
    const sign = (at, word, before) => [
      s("line", { class: "begin", x1: at, x2: at, y1: 4, y2: height - bottom }),
      s("text", { class: "soft", x: at + (before ? -5 : 5), y: 13, "text-anchor": before ? "end" : "start" }, word)];

    this.marks = s("g");
    const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" },
      found.map((v) => [s("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
        s("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, label(v))]).flat(),
      this.days(start, end, x, width - left - right).map(([time, text]) => [
        s("line", { class: "axis", x1: x(time), x2: x(time), y1: height - bottom, y2: height - bottom + 4 }),
        s("text", { x: x(time), y: height - 6, "text-anchor": x(time) > width - 32 ? "end" : x(time) < 20 ? "start" : "middle" }, text)]).flat(),
      s("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      times.length > 1 && bands.map(band),
      s("path", { class: "observed", d: path(history) }),
      s("path", { class: "mean", d: path(times.map((time, i) => [time, mean[i]])) }),
      begin != null && sign(begin, "forecast", close),
      passing && sign(x(now), "now", false),
      this.marks);
    this.plot.replaceChildren(svg);
    this.plot.setAttribute("aria-label", `${title}, over time. Arrow keys read its values.`);
    this.plot.setAttribute("aria-valuemax", Math.max(0, this.points.length - 1));
    fill(this.caption, title, () => title);
    fill(this.legend, [history.length > 0, bands.map((b) => b.name)], () => this.keys(history.length > 0, bands));
    if (this.place != null && this.place >= this.points.length) this.place = null;
    this.move(this.place);
  }

  keys(observed, bands) {
    const line = (kind) => s("path", { class: kind, d: "M1 6H21" });
    const block = (depth) => s("rect", { class: depth ? "band inner level" : "band level", width: 22, height: 12, "fill-opacity": depth ? 0.32 : 0.17 });
    return [observed && ["observed", line("observed")], ["expected", line("mean")], ...bands.map((b, i) => [`${b.name} interval`, block(i)])]
      .filter(Boolean)
      .map(([name, mark]) => h("li", {}, s("svg", { width: 22, height: 12, "aria-hidden": "true" }, mark), name));
  }

  /** [[time, label]]: as many as fit; dates at midnight. */
  days(start, end, x, room) {
    const step = STEPS.find((one) => ((end - start) / one) * 74 <= room) ?? STEPS.at(-1);
    const found = [];
    for (let time = Math.ceil(start / step) * step; time <= end; time += step)
      found.push([time, time % DAY ? clock(time) : day(time).replace(/^\w+ /, step >= 2 * DAY || room < 420 ? "" : "$&")]);
    return found.filter(([time]) => x(time) < this.plot.clientWidth - 4);
  }

  point(event) {
    if (!this.points?.length) return;
    const from = event.clientX - this.plot.getBoundingClientRect().left;
    const away = this.points.map((p) => Math.abs(this.x(p.time) - from));
    this.move(away.indexOf(Math.min(...away)));
  }

  key(event) {
    const last = (this.points?.length ?? 0) - 1;
    const begin = this.points?.findIndex((p) => p.mean !== undefined);
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 8, PageDown: -8 }[event.key];
    const to = by ? (this.place == null ? begin : this.place + by) : { Home: 0, End: last, Escape: null }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.move(to == null ? null : Math.min(last, Math.max(0, to)));
  }

  /** The cursor to a point, or away. */
  move(place) {
    this.place = place;
    const point = place == null ? null : this.points?.[place];
    const words = point ? this.words(point) : "Point at the chart, touch it, or use the arrow keys to read its values.";
    this.readout.textContent = words;
    this.readout.classList.toggle("quiet", !point);
    this.plot.setAttribute("aria-valuenow", place ?? 0);
    this.plot.setAttribute("aria-valuetext", point ? words : "no time chosen");
    if (!this.marks) return;
    const value = point?.mean ?? point?.observed;
    this.marks.replaceChildren(...(point ? [
      s("line", { class: "cursor", x1: this.x(point.time), x2: this.x(point.time), y1: 16, y2: this.floor }),
      isNumber(value) && s("circle", { class: point.mean === undefined ? "observed" : "mean", cx: this.x(point.time), cy: this.y(value), r: 4.5 }),
    ].filter(Boolean) : []));
  }

  words({ time, observed, mean, intervals }) {
    const format = writer(this.data.unit);
    const date = `${day(time)} ${clock(time)} UTC`;
    if (mean === undefined) return `${date}: observed ${isNumber(observed) ? format(observed) : "nothing"}`;
    return `${date}: expected ${format(mean)}${intervals.map(([name, low, high]) => `; ${name}: ${format(low)} to ${format(high)}`).join("")}`;
  }

  /** The table of values, made only where it is looked at. */
  list() {
    if (!this.details.open || !this.data) return;
    const { times, mean, bands, unit, title } = this.data;
    const history = this.recent(1000);
    const format = writer(unit);
    const time = (ms) => `${day(ms)} ${clock(ms)}`;
    fill(this.values, [title, times, mean, bands, history], () => [
      table([["Time, UTC", "when"], ["Expected", "figure"], ...bands.map((b) => [`${b.name} interval`, "figure"])],
        times.map((ms, i) => [time(ms), format(mean[i]), ...bands.map((b) => `${format(b.low[i])} to ${format(b.high[i])}`)])),
      history.length > 0 && h("h3", {}, "Observed before, newest first"),
      history.length > 0 && table([["Time, UTC", "when"], ["Observed", "figure"]],
        history.toReversed().map(([ms, value]) => [time(ms), format(value)])),
    ]);
  }
}

const charts = { total: new Chart($("total-chart")), entity: new Chart($("entity-chart")) };

// -- search ---------------------------------------------------------------------------------------------------

let searchWork = new AbortController();
let searchTimer;
let searchOffset = 0;

function closeResults() {
  clearTimeout(searchTimer);
  searchWork.abort();
  $("page-results").hidden = true;
}

async function search(more = false) {
  searchWork.abort();
  searchWork = new AbortController();
  const { signal } = searchWork;
  const text = $("page-search").value.trim();
  if (!more) searchOffset = 0;
  try {
    const page = await ask("v1/entities", signal, { search: text, limit: PAGE, offset: searchOffset });
    const items = page.entities.map(({ entity }) => h("li", {}, link(entity)));
    if (more) $("page-hits").append(...items);
    else $("page-hits").replaceChildren(...items);
    searchOffset += page.entities.length;
    $("page-found").textContent = page.total
      ? `${count(page.total, "match", "matches")}${searchOffset < page.total ? `, ${whole.format(searchOffset)} shown` : ""}`
      : `No name has “${text}” in it.`;
    $("page-more").hidden = searchOffset >= page.total;
    if (more) items[0]?.firstChild.focus();
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) return refresh();
    $("page-hits").replaceChildren();
    $("page-more").hidden = true;
    $("page-found").textContent = error.message;
  }
  $("page-results").hidden = false;
}

function later() {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, DEBOUNCE);
}

$("page-search").addEventListener("input", later);
$("page-search").addEventListener("focus", () => $("page-results").hidden && later());
$("page-more").addEventListener("click", () => search(true));
$("page-finder").addEventListener("focusout", (event) => {
  if (!$("page-finder").contains(event.relatedTarget)) closeResults();
});
$("page-results").addEventListener("pointerdown", (event) => event.target.closest("a, button") || event.preventDefault());
$("page-finder").addEventListener("click", (event) => event.target.closest("a") && closeResults());
$("page-finder").addEventListener("keydown", async (event) => {
  const stops = [$("page-search"), ...$("page-hits").querySelectorAll("a"), $("page-more")].filter((stop) => !stop.hidden);
  const place = stops.indexOf(document.activeElement);
  if (event.key === "ArrowDown") stops[Math.min(place + 1, stops.length - 1)].focus();
  else if (event.key === "ArrowUp") stops[Math.max(place - 1, 0)].focus();
  else if (event.key === "Escape") {
    $("page-search").focus();
    closeResults();
  } else if (event.key === "Enter" && place === 0) {
    clearTimeout(searchTimer);
    await search();
    const links = [...$("page-hits").querySelectorAll("a")];
    const text = $("page-search").value.trim();
    const hit = links.find((a) => a.textContent === text) ?? (text && links[0]);
    if (hit) {
      hit.click();
      $("page-search").blur();
    }
  } else return;
  event.preventDefault();
});

// -- what a person does ---------------------------------------------------------------------------------------

addEventListener("hashchange", () => turn(true));
document.addEventListener("visibilitychange", () => document.hidden || refresh());
$("page-metric").addEventListener("change", (event) => {
  state.metric = event.target.value;
  const url = new URL(location.href);
  url.searchParams.set("metric", state.metric);
  history.replaceState(null, "", url);
  refresh();
});
let limitTimer;
$("limit-value").addEventListener("input", (event) => {
  state.limits.set(state.metric, event.target.value);
  clearTimeout(limitTimer);
  limitTimer = setTimeout(() => {
    limitWork.abort();
    limitWork = new AbortController();
    const { signal } = limitWork;
    showLimits(signal).catch((error) => signal.aborted || refresh());
  }, DEBOUNCE);
});
$("page-token").addEventListener("submit", (event) => {
  event.preventDefault();
  const token = $("page-token-value").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    $("page-token-why").textContent = "A token has letters, digits and signs without spaces.";
    return;
  }
  sessionStorage.setItem(TOKEN, token);
  $("page-token-value").value = "";
  refresh();
});

turn(false);
