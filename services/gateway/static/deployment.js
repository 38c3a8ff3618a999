"use strict";
// Shows one deployment as the API tells it, and looks again every three seconds.
const name = decodeURIComponent(location.pathname.split("/")[2] || "");
const at = (id) => document.getElementById(id);
at("name").textContent = name;

function table(rows) {
  const made = document.createElement("table");
  for (const row of rows) {
    const line = made.insertRow();
    row.forEach((text, i) => {
      const cell = i ? line.insertCell() : line.appendChild(document.createElement("th"));
      if (/^https?:\/\//.test(text)) {
        const link = cell.appendChild(document.createElement("a"));
        link.href = text;
        link.textContent = text;
      } else cell.textContent = text || "–";
    });
  }
  return made;
}

function heading(text) {
  const made = document.createElement("h2");
  made.textContent = text;
  return made;
}

async function read(path) {
  const answer = await fetch(path, { headers: { Authorization: "Bearer " + sessionStorage.getItem("token") } });
  const body = await answer.json();
  if (answer.ok) return body;
  if (answer.status === 401) sessionStorage.removeItem("token");
  throw new Error(body.detail || String(answer.status));
}

async function show() {
  const asked = !sessionStorage.getItem("token");
  at("ask").hidden = !asked;
  if (asked) return;
  try {
    const path = "/v1/deployments/" + encodeURIComponent(name);
    const [it, replicas] = [await read(path), await read(path + "/replicas")];
    const lines = (text) => String(text || "").split("\n").slice(-20).join("\n");
    at("wrong").textContent = "";
    at("shown").replaceChildren(
      table([
        ["State", it.state],
        ["Bento", (it.template || {}).bento],
        ["URL", (it.urls || [])[0]],
        ["Revision", it.latestRevision],
        ["Serving", it.servingRevision],
      ]),
      heading("Conditions"),
      table((it.conditions || []).map((c) => [c.type, c.status, lines(c.message || c.reason)])),
      heading("Replicas"),
      table((replicas.replicas || []).map((r) => [r.service, r.replica, r.state, lines(r.message)])),
    );
  } catch (error) {
    at("wrong").textContent = error.message;
    at("ask").hidden = Boolean(sessionStorage.getItem("token"));
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  show();
});
show();
setInterval(show, 3000);
