// The view of the visitor's documents: adding, cancelling and deleting.

let files = [];
function take(list) {
  files = [...list];
  const bytes = files.reduce((sum, file) => sum + file.size, 0);
  $("chosen").textContent = files.length
    ? `${files.length === 1 ? files[0].name : `${files.length} files`}, ${(bytes / 1e6).toFixed(1)} MB`
    : "";
}
$("files").addEventListener("change", () => take($("files").files));
for (const name of ["dragover", "dragleave", "drop"])
  element.addEventListener(name, (event) => {
    if (![...(event.dataTransfer?.types || [])].includes("Files")) return;
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") {
      show("documents");
      take(event.dataTransfer.files);
    }
  });
$("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!files.length) return say("state", "Choose files to add first.", true);
  const name = $("collection-name").value.trim(), paths = [], refused = [];
  $("add").disabled = true;
  try {
    for (const [index, file] of files.entries()) {
      say("state", `Uploading ${index + 1} of ${files.length}: ${file.name}`);
      try {
        paths.push((await upload(file)).path);
      } catch {
        refused.push(file.name);
      }
    }
    if (!paths.length) throw new Error(`The upload of ${refused.join(", ")} was refused, perhaps it is too large.`);
    await call("add", { client, collection: name, paths });
    files = [];
    $("files").value = $("chosen").textContent = "";
    const note = refused.length ? ` Not uploaded, perhaps too large: ${refused.join(", ")}.` : "";
    say("state", `Adding to ${name}.${note} You can search meanwhile.`, Boolean(note));
    busy = true;
    await update();
    if (collections.some((collection) => collection.name === name)) choose(name);
    else pending = name;
  } catch (error) {
    say("state", error.message, true);
  } finally {
    $("add").disabled = false;
  }
});
let pending = ""; // a collection that is not there yet, to be chosen when it is
setInterval(() => {
  if (pending && collections.some(({ name }) => name === pending)) {
    choose(pending);
    pending = "";
  }
}, 500);
$("jobs").addEventListener("click", async (event) => {
  const job = event.target.closest("[data-cancel]")?.dataset.cancel;
  if (!job) return;
  try {
    await call("cancel", { client, job: Number(job) });
    say("state", "Cancelling: nothing of the unfinished file stays.");
  } catch (error) {
    say("state", error.message, true);
  }
  update();
});

function confirmDelete(text) {
  $("confirm-text").textContent = text;
  $("confirm").showModal();
  $("confirm-no").focus();
  return new Promise((done) => {
    $("confirm").onclose = () => done($("confirm").returnValue === "yes");
    $("confirm-yes").onclick = () => $("confirm").close("yes");
    $("confirm-no").onclick = () => $("confirm").close("no");
    $("confirm").oncancel = () => ($("confirm").returnValue = "no");
  });
}
async function remove(text, data) {
  if (!(await confirmDelete(text))) return;
  try {
    say("state", (await call("delete", data)).message);
  } catch (error) {
    say("state", error.message, true);
  }
  await update();
}
$("delete").addEventListener("click", () =>
  remove(`Delete the collection ${chosen} with all its files, for everyone who uses this page?`, { collection: chosen }),
);
$("file-list").addEventListener("click", (event) => {
  const file = event.target.closest("[data-delete-file]")?.dataset.deleteFile;
  if (file) remove(`Delete ${file} from ${chosen}?`, { collection: chosen, file });
});
