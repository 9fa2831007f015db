// The view that compares two engines.

$("right").selectedIndex = $("right").options.length - 1;
let compared = 0;
$("compare-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const number = (compared += 1);
  $("comparison").replaceChildren();
  say("compare-status", "Comparing… an engine that is chosen for the first time has to be opened.");
  try {
    const { similar: _, sources: __, ...about } = request();
    const data = { ...about, query: $("compare-query").value, left: $("left").value, right: $("right").value };
    const { html } = await call("compare", data);
    if (number !== compared) return;
    $("comparison").innerHTML = html;
    say("compare-status", "");
  } catch (error) {
    if (number === compared) say("compare-status", error.message, true);
  }
});
