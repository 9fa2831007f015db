// What happens when the page opens: its address says what to search.

if ($("logout")) $("logout").href = `${window.gradio_config?.root ?? ""}/logout`;
chosen = readUrl();
update().then(() => {
  show(location.hash.slice(1));
  if ($("query").value) search({ quiet: true });
});
