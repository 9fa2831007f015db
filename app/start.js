// What happens when the page opens: its address says what to search.

if ($("logout")) $("logout").href = `${window.gradio_config?.root ?? ""}/logout`;
const parameters = new URL(location.href).searchParams;
$("query").value = parameters.get("q") || "";
chosen = parameters.get("in") || "";
sources = parameters.getAll("source");
const mode = element.querySelector(`input[name=mode][value="${CSS.escape(parameters.get("mode") || "meaning")}"]`);
if (mode) mode.checked = true;
update().then(() => {
  show(location.hash.slice(1));
  if ($("query").value) search();
});
