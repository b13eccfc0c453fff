// The folder that rendered pages go to. Lines are appended, and a page counts once all its lines are there, so that an
// interrupted rendering loses at most the page it was at.
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { UserError } from './browser.mjs'

export class Store {
  // `about` says what the pages are made of; a folder with other pages is refused.
  constructor(folder, about) {
    this.folder = folder
    mkdirSync(folder, { recursive: true })
    const file = join(folder, 'about.json')
    const text = `${JSON.stringify(about, null, 1)}\n`
    if (existsSync(file) && readFileSync(file, 'utf8') !== text) {
      throw new UserError(
        `${folder} holds pages of other settings or versions (see its about.json): give another --out, ` +
          'or remove the folder.',
      )
    }
    writeFileSync(file, text)
    this.questions = join(folder, 'questions.jsonl')
    this.elements = join(folder, 'elements.jsonl')
    this.done = this.whole()
  }

  // Numbers of the pages that are complete; what an interruption left behind is cut off.
  whole() {
    cutTorn(this.elements)
    cutTorn(this.questions)
    if (!existsSync(this.questions)) return new Set()
    const bytes = readFileSync(this.questions)
    const counts = new Map()
    const done = new Set()
    let end = 0
    let good = 0
    for (const line of bytes.toString('utf8').split('\n').slice(0, -1)) {
      const { page, of } = JSON.parse(line)
      counts.set(page, (counts.get(page) ?? 0) + 1)
      end += Buffer.byteLength(line) + 1
      if (counts.get(page) !== of) continue
      done.add(page)
      good = end
    }
    if (good < bytes.length) truncateSync(this.questions, good)
    return done
  }

  // Where the picture of a page is, relative to the folder.
  static image(page) {
    const number = String(page).padStart(8, '0')
    return `images/${number.slice(0, 5)}/${number}.png`
  }

  // All rows so far.
  rows() {
    const text = existsSync(this.questions) ? readFileSync(this.questions, 'utf8') : ''
    return text
      .split('\n')
      .filter(Boolean)
      .map(line => JSON.parse(line))
  }

  // The picture first, then what it shows, then its questions, in one write.
  add(page, picture, shown, rows) {
    const file = join(this.folder, Store.image(page))
    mkdirSync(dirname(file), { recursive: true })
    writeFileSync(`${file}.part`, picture)
    renameSync(`${file}.part`, file)
    appendFileSync(this.elements, `${JSON.stringify({ page, ...shown })}\n`)
    appendFileSync(this.questions, rows.map(row => `${JSON.stringify(row)}\n`).join(''))
    this.done.add(page)
  }
}

function cutTorn(file) {
  if (!existsSync(file)) return
  const bytes = readFileSync(file)
  const end = bytes.lastIndexOf(10) + 1
  if (end < bytes.length) truncateSync(file, end)
}
