// The blind grid: a number key answers the image in focus and goes to the next; a button hands in all answers.
const count = () => {
  const all = [...element.querySelectorAll("fieldset[data-number]")];
  const answered = all.filter((one) => one.querySelector("input:checked"));
  all.forEach((one) => one.classList.toggle("dl-answered", answered.includes(one)));
  const told = element.querySelector(".dl-blind-count");
  if (told) told.textContent = `${answered.length} of ${all.length} answered`;
};
element.addEventListener("change", count);
element.addEventListener("keydown", (event) => {
  const one = event.target.closest("fieldset[data-number]");
  const place = Number(event.key) - 1;
  if (!one || !Number.isInteger(place) || place < 0) return;
  const choices = [...one.querySelectorAll("input")];
  if (!choices[place]) return;
  event.preventDefault();
  choices[place].checked = true;
  count();
  const next = one.nextElementSibling;
  if (next && next.matches("fieldset")) next.focus();
});
element.addEventListener("click", (event) => {
  if (!event.target.closest(".dl-blind-save")) return;
  const answers = {};
  element.querySelectorAll("input:checked").forEach((input) => {
    answers[input.closest("fieldset").dataset.number] = input.value;
  });
  trigger("answers", { answers });
});
