"use strict";
for (const slider of document.querySelectorAll(".slider")) {
  const frames = slider.querySelectorAll("li");
  const range = slider.querySelector("input");
  const output = slider.querySelector("output");
  const show = () => {
    frames.forEach((frame, i) => frame.classList.toggle("shown", i === Number(range.value)));
    const label = frames[range.value].dataset.label;
    output.textContent = label;
    range.setAttribute("aria-valuetext", label);
  };
  slider.classList.add("on");
  range.addEventListener("input", show);
  show();
}
