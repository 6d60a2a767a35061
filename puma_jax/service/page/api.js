// Calls of the service. A key, where it asks for one, stays in this tab.

export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem("key"),
  set: (value) => sessionStorage.setItem("key", value),
};

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let message = `The service answered with status ${answer.status}.`;
  try {
    const body = await answer.json();
    message = body.error?.message ?? body.message ?? message;
  } catch {
    // Not JSON: something between this page and the service has answered.
  }
  throw new ServiceError(answer.status, message);
}

export async function about() {
  return (await call("/index")).json();
}

/** Return what a query finds. `query.picture` is a file; all else is text and numbers. */
export async function search(query, signal) {
  const { picture, ...fields } = query;
  const given = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
  if (!picture) {
    const body = JSON.stringify(Object.fromEntries(given));
    const headers = { "Content-Type": "application/json" };
    return (await call("/search", { method: "POST", headers, body, signal })).json();
  }
  const form = new FormData();
  for (const [name, value] of given) form.set(name, value);
  form.set("image", picture);
  return (await call("/search", { method: "POST", body: form, signal })).json();
}

/** Return where the browser finds an image: images have no headers, so that a key needs a fetch. */
export async function imageUrl(path) {
  if (!key.get()) return path;
  return URL.createObjectURL(await (await call(path)).blob());
}
