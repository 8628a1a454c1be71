// Explorers made ahead: a slider over pictures, each with its caption.
for (const figure of document.querySelectorAll("figure.live")) {
  const { name, start, frames } = JSON.parse(figure.querySelector("script").textContent);
  const [img, caption, label] = ["img", "figcaption", ".slider"].map((part) => figure.querySelector(part));
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: 0, max: frames.length - 1, value: start, ariaLabel: name });
  input.oninput = () => {
    const frame = frames[input.value];
    img.src = "data:image/webp;base64," + frame.webp;
    img.alt = caption.textContent = frame.caption;
    label.querySelector("b").textContent = input.ariaValueText = frame.text;
  };
  label.append(input);
}
