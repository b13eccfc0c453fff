// Chromium, and a picture of a page with what it shows.
import { existsSync } from 'node:fs'
import { extract } from './extract.mjs'

export class UserError extends Error {}

const PLACES = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome']
const FLAGS = [
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
  '--disable-lcd-text',
  '--font-render-hinting=none',
  '--force-color-profile=srgb',
  '--hide-scrollbars',
  '--disable-partial-raster',
  '--disable-skia-runtime-opts',
  '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
]

// The browser (a fresh profile, nothing but this machine in reach).
export async function launch() {
  const file = process.env.CHROMIUM ?? PLACES.find(existsSync)
  if (!file || !existsSync(file)) {
    throw new UserError(
      `there is no chromium at ${file ?? PLACES.join(', ')}: install it (apt install chromium), or set ` +
        'CHROMIUM=/path/to/chromium.',
    )
  }
  const { chromium } = await import('playwright-core')
  try {
    return await chromium.launch({ executablePath: file, headless: true, args: FLAGS })
  } catch (error) {
    const reason = error.message.split('\n')[0]
    throw new UserError(
      `${file} does not start (${reason}): check that it runs alone, or set CHROMIUM=/path/to/chromium.`,
    )
  }
}

export class Tab {
  static async open(browser, seconds, { scripts = false } = {}) {
    const context = await browser.newContext({
      javaScriptEnabled: true,
      reducedMotion: 'reduce',
      locale: 'en-US',
    })
    if (scripts) await context.addInitScript(freeze)
    const page = await context.newPage()
    page.setDefaultTimeout(seconds * 1000)
    page.on('dialog', dialog => dialog.dismiss().catch(() => {}))
    return new Tab(page, await context.newCDPSession(page), seconds)
  }

  constructor(page, session, seconds) {
    Object.assign(this, { page, session, seconds })
  }

  // Opens an address in a window of width x height CSS pixels, `scale` picture pixels each.
  async show(address, width, height, scale) {
    await this.session.send('Emulation.setDeviceMetricsOverride', {
      width,
      height,
      deviceScaleFactor: scale,
      mobile: false,
    })
    await this.page.goto(address, { waitUntil: 'load' })
    await this.limited(
      this.page.evaluate(async () => {
        await Promise.all(
          [...document.fonts]
            .filter(face => face.status !== 'error')
            .map(face => face.load().catch(() => {})),
        )
        await document.fonts.ready
        // What was laid out before a font came is laid out anew: texts in fields would stay a pixel off.
        document.documentElement.style.display = 'none'
        document.documentElement.getBoundingClientRect()
        document.documentElement.style.display = ''
        await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
      }),
    )
  }

  // {picture, shown} of a region in CSS pixels; of the whole window without one.
  async take(region, scale) {
    const shown = await this.limited(this.page.evaluate(extract, region ?? null))
    const clip = region ? { clip: { ...region, scale: 1 } } : {}
    const { data } = await this.limited(
      this.session.send('Page.captureScreenshot', { format: 'png', ...clip }),
    )
    const size = shown.size.map(length => Math.round(length * scale))
    return { picture: Buffer.from(data, 'base64'), shown: { ...scaled(shown, scale), size } }
  }

  limited(work) {
    let timer
    const late = new Promise((_, fail) => {
      timer = setTimeout(
        () => fail(new Error(`Timeout ${this.seconds}s exceeded`)),
        this.seconds * 1000,
      )
    })
    return Promise.race([work, late]).finally(() => clearTimeout(timer))
  }
}

// Time and chance of a published page stand still. Runs inside the browser.
function freeze() {
  let state = 7
  Math.random = () => (state = (state * 16807) % 2147483647) / 2147483647
  const now = 1750000000000
  const Real = Date
  globalThis.Date = class extends Real {
    constructor(...parts) {
      super(...(parts.length ? parts : [now]))
    }

    static now() {
      return now
    }
  }
}

// All boxes and edges in picture pixels, one decimal.
function scaled(value, scale, key = '') {
  if (Array.isArray(value)) return value.map(item => scaled(item, scale, key))
  if (value && typeof value === 'object') {
    return Object.fromEntries(
      Object.entries(value).map(([name, item]) => [name, scaled(item, scale, name)]),
    )
  }
  const length = ['box', 'xs', 'y1', 'y2', 'size', 'dialogs'].includes(key)
  return length && typeof value === 'number' ? Math.round(value * scale * 10) / 10 : value
}
