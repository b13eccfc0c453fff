// From what a page shows to rows of the dataset: one for each question, in ScreenSpot's columns and a few more.
import { ask, POINTING } from './ask.mjs'
import { Store } from './store.mjs'
import { ICONS } from './words.mjs'

const NAMES = Object.keys(ICONS)
export const LIMITS = {
  training: { low: 15, high: 60, families: 5 },
  real: { low: 6, high: 90, families: 2 },
}

// Named elements and cells of tables that are in full view.
export function named(shown) {
  const elements = shown.elements.filter(
    e => !e.cut && !e.covered && (e.text || e.label || e.icons.length),
  )
  const cells = shown.tables
    .flatMap(table => table.rows)
    .flatMap(row => row.cells)
    .filter(cell => cell.whole && cell.text)
  return elements.length + cells.length
}

// The questions of a page, or null where it shows too little, too much, or too few families.
export function questionsOf(shown, limits, ...key) {
  const count = named(shown)
  const questions = ask(shown, NAMES, ...key)
  const families = new Set(questions.map(question => question.family))
  return count >= limits.low && count <= limits.high && families.size >= limits.families
    ? questions
    : null
}

export function rowsOf(name, page, questions, facts, size) {
  const count = {}
  return questions.map(({ family, text, answer, box, more }) => {
    count[family] = (count[family] ?? -1) + 1
    return {
      page,
      of: questions.length,
      id: `${name}_${page}_${family}_${count[family]}`,
      img_filename: Store.image(page),
      img_size: size,
      platform: 'web',
      application: facts.framework,
      group: facts.kind,
      ui_type: family === 'icon' ? 'icon' : 'text',
      instruction: text,
      bbox: box,
      answer,
      family,
      kind: POINTING.includes(family) ? 'point' : 'read',
      region: [box, ...more],
    }
  })
}

// How often each instruction was asked about the pages of a theme.
export class Asked {
  constructor(rows = []) {
    this.times = new Map()
    for (const row of rows) this.add(row.application, row.instruction)
  }

  fresh(theme, instruction) {
    return (this.times.get(`${theme} ${instruction}`) ?? 0) < 2
  }

  add(theme, instruction) {
    const key = `${theme} ${instruction}`
    this.times.set(key, (this.times.get(key) ?? 0) + 1)
  }
}
