"use strict";
// Draws the API reference from /openapi.json. Texts are set as text, never as markup.
function make(tag, parent, text, kind) {
  const made = parent.appendChild(document.createElement(tag));
  if (text) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// Prose of a comment in a proto: a blank line ends a paragraph, a single one is a space, `backticks` are code.
function prose(parent, text, kind) {
  for (const paragraph of (text || "").split(/\n\s*\n/)) {
    if (!paragraph.trim()) continue;
    const made = make("p", parent, "", kind);
    paragraph
      .replace(/\n(?![-*] )/g, " ")
      .split(/`([^`]+)`/)
      .forEach((part, at) => (at % 2 ? make("code", made, part) : made.append(part)));
  }
}

const nameOf = (schema) => (schema && schema.$ref ? schema.$ref.split("/").pop() : "");

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return nameOf(schema);
  if (schema.type === "array") return "list of " + typeOf(schema.items);
  if (schema.type === "object" && schema.additionalProperties && schema.additionalProperties !== true)
    return "map of text to " + typeOf(schema.additionalProperties);
  return [].concat(schema.type || "any").join(" or ") + (schema.format ? " (" + schema.format + ")" : "");
}

function innermost(schema) {
  while (schema && !schema.$ref) schema = schema.items || (typeof schema.additionalProperties === "object" ? schema.additionalProperties : null);
  return schema;
}

// Draws a schema's fields when first opened: messages may hold themselves.
function fields(parent, schema, all) {
  const found = all[nameOf(innermost(schema))];
  if (!found) return;
  if (found.enum) prose(parent, found.description, "text quiet");
  for (const [name, field] of Object.entries(found.properties || {})) {
    const inner = innermost(field);
    const row = make(inner ? "details" : "div", parent);
    const head = make(inner ? "summary" : "div", row);
    make("code", head, name);
    make("span", head, "  " + typeOf(field), "type");
    prose(row, field.description, "text quiet");
    if (inner) row.addEventListener("toggle", () => fields(row, inner, all), { once: true });
  }
}

function content(parent, title, body, all) {
  const [kind, media] = Object.entries((body && body.content) || {})[0] || [];
  if (!kind) return;
  const schema = media["x-itemSchema"] || media.schema;
  make("h4", parent, title);
  const whole = make("details", parent);
  const head = make("summary", whole);
  make("code", head, typeOf(schema));
  make("span", head, "  " + kind, "type");
  whole.addEventListener("toggle", () => fields(whole, schema, all), { once: true });
}

function operation(parent, path, verb, it, all) {
  const drawn = make("section", parent);
  drawn.id = it.operationId;
  const line = make("div", drawn, "", "line");
  make("span", line, verb.toUpperCase(), "verb");
  line.append(path);
  prose(drawn, it.description, "text");
  if (it.parameters) {
    make("h4", drawn, "Parameters");
    const rows = make("table", drawn);
    for (const parameter of it.parameters) {
      const row = rows.insertRow();
      make("code", row.insertCell(), parameter.name);
      make("span", row.insertCell(), parameter.in + ", " + typeOf(parameter.schema), "type");
      prose(row.insertCell(), parameter.description, "text");
    }
  }
  content(drawn, "Body", it.requestBody, all);
  content(drawn, "Answer", it.responses["200"], all);
  return drawn;
}

async function draw() {
  const api = await (await fetch("/openapi.json")).json();
  const all = api.components.schemas;
  const reference = document.getElementById("reference");
  const contents = document.getElementById("contents");
  prose(reference, api.info.description, "text");
  const drawn = [];
  for (const tag of api.tags) {
    const title = make("h3", contents, tag.name);
    make("h2", reference, tag.name);
    prose(reference, tag.description, "text");
    for (const [path, verbs] of Object.entries(api.paths))
      for (const [verb, it] of Object.entries(verbs)) {
        if (it.tags[0] !== tag.name) continue;
        const link = make("a", contents, it.operationId.split("_")[1]);
        link.href = "#" + it.operationId;
        drawn.push([link, operation(reference, path, verb, it, all), (path + " " + it.operationId + " " + it.description).toLowerCase(), title]);
      }
  }
  document.getElementById("find").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const [link, section, text] of drawn) link.hidden = section.hidden = !words.every((word) => text.includes(word));
  });
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
draw();
