// node render.mjs --split train --pages 20000    renders pages into runs/cache/screens/<split>-<seed>, see README.md
import { existsSync, readFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const HERE = dirname(fileURLToPath(import.meta.url))
const MODULES = join(HERE, 'node_modules')
const SPLITS = { train: 20000, val: 300, test: 200, final: 540, real: 155 }
const FRESH = 3 // new questions that a crop of a published page must allow
const TRIES = 12 // pages drawn for one number until one shows enough

const CLOSED = /browser has been closed|browser closed|browser has disconnected/i
const NUMBERS = { pages: [1, 10_000_000], seed: [0, 2 ** 31], tabs: [1, 16], seconds: [1, 600] }

function options(UserError) {
  const names = { split: 'train', pages: '', seed: '0', out: '', tabs: '2', seconds: '15' }
  const known = Object.fromEntries(
    Object.keys(names).map(name => [name, { type: 'string', default: names[name] }]),
  )
  let values
  try {
    values = parseArgs({ options: known }).values
  } catch (error) {
    throw new UserError(
      `${error.message.split('\n')[0].split('. ')[0]}: use --${Object.keys(names).join(', --')}.`,
    )
  }
  if (!(values.split in SPLITS)) {
    throw new UserError(
      `--split ${values.split} does not exist: choose one of ${Object.keys(SPLITS).join(', ')}.`,
    )
  }
  values.pages ||= String(SPLITS[values.split])
  for (const [name, [low, high]] of Object.entries(NUMBERS)) {
    const number = Number(values[name])
    if (!Number.isInteger(number) || number < low || number > high) {
      throw new UserError(
        `--${name} must be a whole number from ${low} to ${high}, got ${values[name]}.`,
      )
    }
    values[name] = number
  }
  values.out ||= join(HERE, '../../runs/cache/screens', `${values.split}-${values.seed}`)
  return { ...values, out: resolve(values.out) }
}

// The packages that package.json names, in the versions it names.
function checkPackages(UserError) {
  const { dependencies } = JSON.parse(readFileSync(join(HERE, 'package.json'), 'utf8'))
  for (const [name, version] of Object.entries(dependencies)) {
    const file = join(MODULES, name, 'package.json')
    const there = existsSync(file) ? JSON.parse(readFileSync(file, 'utf8')).version : 'nothing'
    if (there !== version) {
      throw new UserError(
        `node_modules has ${there} of ${name}, and ${version} is needed: run npm install in ${HERE}.`,
      )
    }
  }
  return dependencies
}

function progress(store, total) {
  const start = Date.now()
  const before = store.done.size
  let shown = 0
  return (last = false) => {
    if (!last && Date.now() - shown < 5000) return
    shown = Date.now()
    const speed = (store.done.size - before) / ((Date.now() - start) / 1000 || 1)
    const left = speed ? Math.ceil((total - store.done.size) / speed / 60) : '?'
    process.stderr.write(
      `${store.done.size} of ${total} pages, ${speed.toFixed(1)} pages/s, ${left} min left\n`,
    )
  }
}

// A generated page that shows enough: the first of its draws. The same (split, seed, page) is the same picture.
async function generated(tab, lib, served, { split, seed }, page) {
  for (let attempt = 0; attempt < TRIES; attempt++) {
    const key = [split, seed, page, attempt]
    let made
    try {
      made = lib.makePage(MODULES, ...key)
    } catch (error) {
      if (error.message !== 'no word left') throw error
      continue
    }
    const name = key.join('-')
    const scale = lib.SIDE / made.width
    served.pages.set(name, made.html)
    await tab.show(`${served.address}/page/${name}`, made.width, made.width, scale)
    const { picture, shown } = await tab.take(null, scale)
    served.pages.delete(name)
    const questions = lib.questionsOf(shown, lib.LIMITS.training, ...key)
    if (questions)
      return { picture, shown: { ...made.facts, attempt, ...shown }, questions, facts: made.facts }
  }
  throw new Error(`none of ${TRIES} draws shows enough`)
}

async function renderGenerated(setup) {
  const { lib, served, store, given, report } = setup
  const waiting = Array.from({ length: given.pages }, (_, i) => i).filter(
    page => !store.done.has(page),
  )
  const failed = []
  const work = async () => {
    let tab = await setup.open()
    while (waiting.length) {
      const page = waiting.shift()
      try {
        const { picture, shown, questions, facts } = await generated(tab, lib, served, given, page)
        const name = `${given.split}-${given.seed}`
        store.add(
          page,
          picture,
          shown,
          lib.rowsOf(name, page, questions, facts, [lib.SIDE, lib.SIDE]),
        )
      } catch (error) {
        if (lib.fatal(error)) throw error
        failed.push({ page, reason: error.message.split('\n')[0] })
        await tab.page
          .context()
          .close()
          .catch(() => {})
        tab = await setup.open()
      }
      report()
    }
  }
  await Promise.all(Array.from({ length: given.tabs }, work))
  return failed
}

// Crops of published pages, at most four of each, until there are enough.
async function renderReal(setup) {
  const { lib, served, store, given, report } = setup
  const failed = []
  const [width, height] = lib.window
  // The frame of a theme is on all its pages: what was asked about it twice is not asked again.
  const asked = new lib.Asked(store.rows())
  let tab = await setup.open({ scripts: true })
  for (const [number, { theme, path, scale }] of lib
    .publishedPages(MODULES, given.seed)
    .entries()) {
    if (store.done.size >= given.pages) break
    try {
      await tab.show(`${served.address}/modules/${path}`, width, height, scale)
      await new Promise(done => setTimeout(done, 1000)) // charts and tables that scripts draw
      const tall = await tab.limited(tab.page.evaluate(() => document.documentElement.scrollHeight))
      let taken = 0
      for (const [at, region] of lib.crops(scale, tall, theme, path).entries()) {
        const page = number * 100 + at
        if (taken >= 4 || store.done.size >= given.pages) break
        if (store.done.has(page)) taken++
        if (store.done.has(page)) continue
        const { picture, shown } = await tab.take(region, scale)
        const all = lib.questionsOf(shown, lib.LIMITS.real, 'real', given.seed, page) ?? []
        const questions = all.filter(question => asked.fresh(theme, question.text))
        if (questions.length < FRESH) continue
        questions.forEach(question => asked.add(theme, question.text))
        const facts = { framework: theme, kind: path }
        store.add(
          page,
          picture,
          { ...facts, ...shown },
          lib.rowsOf(`real-${given.seed}`, page, questions, facts, [lib.SIDE, lib.SIDE]),
        )
        taken++
      }
    } catch (error) {
      if (lib.fatal(error)) throw error
      failed.push({ page: path, reason: error.message.split('\n')[0] })
      await tab.page
        .context()
        .close()
        .catch(() => {})
      tab = await setup.open({ scripts: true })
    }
    report()
  }
  return failed
}

async function main() {
  if (Number(process.versions.node.split('.')[0]) < 20) {
    process.stderr.write(`error: node ${process.versions.node} is too old: use node 20 or newer.\n`)
    return 2
  }
  class UserError extends Error {}
  let browser, served, store
  try {
    const given = options(UserError)
    const packages = checkPackages(UserError)
    const parts = ['browser', 'pages', 'real', 'rows', 'serve', 'store']
    const modules = await Promise.all(parts.map(name => import(`./lib/${name}.mjs`)))
    const lib = Object.assign({}, ...modules)
    // A page may be at fault; the disk, the browser and this code are not its faults.
    lib.fatal = error =>
      error instanceof lib.UserError ||
      typeof error.code === 'string' ||
      error instanceof TypeError ||
      error instanceof ReferenceError ||
      CLOSED.test(error.message)
    browser = await lib.launch()
    const about = {
      split: given.split,
      seed: given.seed,
      side: lib.SIDE,
      chromium: browser.version(),
      packages,
    }
    store = new lib.Store(given.out, about)
    served = Object.assign({ pages: new Map() })
    Object.assign(served, await lib.serve(MODULES, served.pages, lib.MOVED, lib.ROOT))
    const report = progress(store, given.pages)
    const setup = {
      lib,
      served,
      store,
      given,
      report,
      open: extra => lib.Tab.open(browser, given.seconds, extra),
    }
    const failed = await (given.split === 'real' ? renderReal(setup) : renderGenerated(setup))
    report(true)
    process.stdout.write(`pages: ${given.out}\n`)
    if (!failed.length) return 0
    const list = failed
      .slice(0, 5)
      .map(({ page, reason }) => `${page} (${reason})`)
      .join(', ')
    process.stderr.write(
      `error: ${failed.length} pages did not come to rest or show enough: ${list}; all others are ` +
        'there, and the same command tries these again, longer with --seconds.\n',
    )
    return 1
  } catch (error) {
    const kept = store
      ? ` ${store.done.size} pages are in ${store.folder}; the same command goes on from them.`
      : ''
    const closed = CLOSED.test(error.message)
    if (error.constructor.name !== 'UserError' && error.code !== 'ENOSPC' && !closed) throw error
    const what =
      error.code === 'ENOSPC'
        ? `the disk is full (${error.path ?? store?.folder}): free some space.`
        : closed
          ? 'chromium has ended: is there enough memory? Try fewer --tabs.'
          : error.message
    process.stderr.write(`error: ${what}${kept}\n`)
    return 2
  } finally {
    await browser?.close().catch(() => {})
    served?.close?.()
  }
}

process.exitCode = await main()
