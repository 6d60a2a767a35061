// Draws /openapi.json: every operation, its fields, and a call to copy.

const EXAMPLES = {
  "/v1/embeddings": { model: "MODEL", input: ["a red bicycle"] },
  "/v2/embed": { model: "MODEL", input_type: "search_query", texts: ["a red bicycle"] },
  "/search": { text: "a red bicycle", k: 5 },
};

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  return made;
}

/** Return a text whose parts in backticks are code. */
function prose(tag, text) {
  const parts = text.split("`").map((part, number) => (number % 2 ? element("code", part) : part));
  return element(tag, "", ...parts);
}

/** Return the type of a schema in words. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) {
    return schema.anyOf.filter((one) => one.type !== "null").map(typeOf).join(" or ");
  }
  if (schema.oneOf) return schema.oneOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((one) => `"${one}"`).join(", ");
  if (schema.const) return `"${schema.const}"`;
  return schema.type === "array" ? `list of ${typeOf(schema.items ?? {})}` : (schema.type ?? "any");
}

function fields(schema) {
  const table = element("table");
  table.append(element("tr", "", ...["Field", "Type", ""].map((name) => element("th", name))));
  for (const [name, field] of Object.entries(schema.properties)) {
    const required = schema.required?.includes(name) ? "Required. " : "";
    const row = element("tr", "", element("td", "", element("code", name)));
    row.append(element("td", typeOf(field)), prose("td", required + (field.description ?? "")));
    table.append(row);
  }
  return table;
}

function call(path, verb, model) {
  const example = EXAMPLES[path];
  const url = `${location.origin}${path}`;
  if (!example) return element("pre", `curl ${verb === "post" ? "-X POST " : ""}'${url}'`);
  const body = JSON.stringify({ ...example, ...(example.model && { model }) });
  return element(
    "pre",
    `curl ${url} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`,
  );
}

function operation(path, verb, described, model) {
  const made = element("details");
  made.className = "operation";
  const kind = element("span", verb.toUpperCase());
  kind.className = "verb";
  const [first, ...rest] = (described.description ?? "").split("\n\n");
  made.append(element("summary", "", kind, element("code", path), element("span", first)));
  const inside = element("div", "", ...rest.map((text) => prose("p", text)));
  inside.className = "inside";
  const body = described.requestBody?.content["application/json"]?.schema;
  if (body) inside.append(fields(body));
  inside.append(call(path, verb, model));
  made.append(inside);
  return made;
}

async function open() {
  const key = sessionStorage.getItem("key");
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const [answer, models] = await Promise.all(
    ["/openapi.json", "/v1/models"].map((path) => fetch(path, { headers })),
  );
  if (!answer.ok) {
    const notice = document.querySelector("#notice");
    notice.hidden = false;
    notice.textContent =
      answer.status === 401
        ? "This service asks for a key: give it on the search page first."
        : `The service answered with status ${answer.status}.`;
    return;
  }
  const model = models.ok ? (await models.json()).data[0].id : "MODEL";
  const groups = new Map();
  for (const [path, verbs] of Object.entries((await answer.json()).paths)) {
    for (const [verb, described] of Object.entries(verbs)) {
      const group = described.tags?.[0] ?? "Other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(operation(path, verb, described, model));
    }
  }
  document.querySelector("#about").textContent = model;
  for (const [name, operations] of groups) {
    document.querySelector("#operations").append(element("h2", name), ...operations);
  }
}

document.querySelector("#base").textContent = location.origin;
open();
