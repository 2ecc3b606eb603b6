"use strict";
const root = document.documentElement;
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const stops = all("article");
const pageOf = (stop) => stop.closest(".page");
const dark = matchMedia("(prefers-color-scheme: dark)");
const letters = document.getElementById("letters");
const help = document.getElementById("help");
let at = 0;

// --- A stop: its words, and its lines of the scripts

function light(stop) {
  const code = pageOf(stop).querySelector(".code");
  if (!code) return;
  all(".lit", code).forEach((line) => line.classList.remove("lit"));
  const functions = new Set(stop.dataset.functions.split(" "));
  for (const side of ["old", "new"]) {
    for (const number of stop.dataset[side].split(" ").filter(Boolean)) {
      const line = code.querySelector(`.${side} [data-n="${number}"]`);
      line.classList.add("lit");
      functions.add(line.closest(".run").dataset.f);
    }
  }
  for (const run of all(".run.same", code)) run.classList.toggle("out", !functions.has(run.dataset.f));
  scrollToLight(code);
}

function scrollToLight(code) {
  const seen = all(".lit", code).filter((line) => line.offsetParent);
  const first = seen.find((line) => line.closest(".run").dataset.f !== "imports") || seen[0];
  const margin = code.querySelector(".names").offsetHeight + code.clientHeight / 6;
  const lies = first ? first.getBoundingClientRect().top - code.getBoundingClientRect().top : -code.scrollTop;
  code.scrollTop += lies - (first ? margin : 0);
}

function show(number, focus = false) {
  const stop = stops[Math.max(0, Math.min(number, stops.length - 1))];
  const lost = document.activeElement.closest("article");
  at = stops.indexOf(stop);
  all(".on").forEach((each) => each.classList.remove("on"));
  [stop, pageOf(stop)].forEach((each) => each.classList.add("on"));
  root.classList.toggle("words-only", "words" in stop.dataset);
  pageOf(stop).querySelector(".words").scrollTop = 0;
  if (!focus) scrollTo(0, 0);
  light(stop);
  const heading = stop.querySelector("h2, h3");
  for (const link of all("nav a, .contents a")) {
    const here = link.hash === `#${stop.id}` || (link.closest("nav") && pageOf(stop).contains(goal(link.hash)));
    here ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }
  all(".contents").forEach((list) => (list.open = false));
  const where = pageOf(stop).querySelector("h2").textContent;
  document.getElementById("said").textContent =
    stop.querySelector("h2") ? where : `${where}. ${heading.textContent}. ${stop.dataset.functions}`;
  document.title = `${heading.textContent} · ${document.querySelector("h1").textContent}`;
  if (location.hash !== `#${stop.id}`) history.replaceState(null, "", `#${stop.id}`);
  if (focus || (lost && lost !== stop)) heading.focus({ preventScroll: true });
}

function goal(hash) {
  const place = document.getElementById(decodeURIComponent(hash.slice(1)));
  if (place && place.matches(".page")) return place.querySelector("article");
  return place && place.closest("article");
}

function follow() {
  const stop = goal(location.hash);
  if (stop) show(stops.indexOf(stop), true);
}

function step(by) { // to the first stop of the next page, or of the one before
  const pages = all(".page");
  const page = pages[pages.indexOf(pageOf(stops[at])) + by];
  if (page) show(stops.indexOf(page.querySelector("article")));
}

function page(number) {
  show(stops.indexOf(all(".page")[number].querySelector("article")));
}

// --- How it is shown

function toggle(name, on = !root.classList.contains(name)) {
  root.classList.toggle(name, on);
  press({ fold: "f", whole: "w", big: "p" }[name], on);
}

function press(key, on) {
  document.querySelector(`button[data-key="${key}"]`).setAttribute("aria-pressed", on);
}

function change(name) {
  toggle(name);
  if (name === "fold") toggle("whole", false);
  if (name === "whole") toggle("fold", false);
  if (name === "big") toggle("fold", root.classList.contains("big")), toggle("whole", false);
  light(stops[at]);
}

function theme(name) {
  root.dataset.theme = name;
  press("d", name === "dark");
}

// --- Keys, and what else is pressed

const ACTIONS = {
  ArrowRight: () => show(at + 1),
  ArrowLeft: () => show(at - 1),
  ArrowDown: () => step(1),
  ArrowUp: () => step(-1),
  f: () => change("fold"),
  w: () => change("whole"),
  p: () => change("big"),
  d: () => theme(root.dataset.theme === "dark" ? "light" : "dark"),
  "?": () => help.showModal(),
};
for (let number = 0; number < 6; number++) ACTIONS[number] = () => page(number);

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const inside = event.target.closest("pre, .wide, .code, .words, input");
  const scrolls = inside && inside.scrollWidth > inside.clientWidth;
  let key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (root.classList.contains("big")) key = { PageDown: "ArrowRight", PageUp: "ArrowLeft" }[key] || key;
  if (/^Arrow(Up|Down)$/.test(key) && inside) return; // they scroll what has the focus
  if (/^Arrow(Left|Right)$/.test(key) && scrolls) return;
  if (key.length === 1 && key !== "?" && !letters.checked) return;
  if (!(key in ACTIONS)) return;
  event.preventDefault();
  ACTIONS[key]();
});
for (const button of all("button[data-key]")) button.onclick = () => ACTIONS[button.dataset.key]();

let touch = null;
addEventListener("touchstart", (event) => {
  const inside = event.target.closest("pre, .wide");
  const scrolls = inside && inside.scrollWidth > inside.clientWidth;
  touch = event.touches.length === 1 && !scrolls ? event.touches[0] : null;
}, { passive: true });
addEventListener("touchend", (event) => {
  if (!touch || help.open) return;
  const [x, y] = ["clientX", "clientY"].map((axis) => event.changedTouches[0][axis] - touch[axis]);
  if (Math.abs(x) > 60 && Math.abs(x) > 2 * Math.abs(y)) show(at + (x < 0 ? 1 : -1));
}, { passive: true });

addEventListener("hashchange", follow);
dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
theme(dark.matches ? "dark" : "light");
root.classList.add("js");
const first = goal(location.hash);
show(first ? stops.indexOf(first) : 0, Boolean(first));
