// Pages of a real browser that have the genuine browser SDK (npm livekit-client), and how a program
// reports. The browser's path comes from the environment, CHROMIUM.

import { once } from "node:events";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const sdk = createRequire(import.meta.url).resolve("livekit-client");
const LIMIT_MS = 45_000;

/** Does some work with a function that opens a page, named for its errors. */
export async function inBrowser(work) {
  // From loopback, since browsers let only such pages use the microphone without TLS and connect to
  // servers on loopback.
  const site = createServer((_, response) => {
    response.setHeader("content-type", "text/html").end("<!doctype html>");
  }).listen(0, "127.0.0.1");
  await once(site, "listening");
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: [
      "--disable-gpu",
      "--no-proxy-server",
      "--use-fake-device-for-media-stream",
      "--use-fake-ui-for-media-stream",
      "--autoplay-policy=no-user-gesture-required",
    ],
  });
  try {
    await work((name) => open(browser, name, `http://127.0.0.1:${site.address().port}/`));
  } finally {
    await browser.close();
    site.close();
  }
}

async function open(browser, name, url) {
  const context = await browser.newContext({ permissions: ["microphone"] });
  const page = await context.newPage();
  page.setDefaultTimeout(LIMIT_MS);
  page.on("pageerror", (error) => console.error(name, error));
  page.on("console", (message) => {
    // Without queries of addresses: they have tokens.
    if (message.type() === "error") console.error(name, message.text().replaceAll(/\?\S*/g, ""));
  });
  await page.goto(url);
  await page.addScriptTag({ path: sdk });
  return page;
}

export async function bounded(what, work) {
  let timer;
  const tooLate = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not within ${LIMIT_MS} ms`)), LIMIT_MS);
  });
  return Promise.race([work, tooLate]).finally(() => clearTimeout(timer));
}

/** One JSON object a line. */
export function emit(event, fields) {
  console.log(JSON.stringify({ event, ...fields }));
}
