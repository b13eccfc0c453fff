// node reask.mjs <folder>    asks the questions of rendered pages anew, from what the pages show; renders nothing
import { createReadStream, existsSync, renameSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { createInterface } from 'node:readline'
import { ask } from './lib/ask.mjs'
import { Asked, rowsOf } from './lib/rows.mjs'
import { ICONS } from './lib/words.mjs'

const folder = process.argv[2] ?? ''
const source = join(folder, 'elements.jsonl')
if (!existsSync(source)) {
  process.stderr.write(`error: there is no ${source}: give a folder that render.mjs made.\n`)
  process.exit(2)
}
const [split, seed] = basename(folder).split('-')
const names = Object.keys(ICONS)
const pages = new Map() // a page that was interrupted is there twice: the later one counts
const asked = new Asked()
for await (const line of createInterface({ input: createReadStream(source) })) {
  const { page, framework, kind, attempt, ...shown } = JSON.parse(line)
  const key = split === 'real' ? ['real', seed, page] : [split, seed, page, attempt]
  const theme = split === 'real' ? framework : ''
  const fresh = question => !theme || asked.fresh(theme, question.text)
  const questions = ask(shown, names, ...key).filter(fresh)
  if (theme) questions.forEach(question => asked.add(theme, question.text))
  pages.set(page, rowsOf(`${split}-${seed}`, page, questions, { framework, kind }, shown.size))
}
const text = [...pages.values()]
  .flat()
  .map(row => `${JSON.stringify(row)}\n`)
  .join('')
writeFileSync(join(folder, 'questions.part'), text)
renameSync(join(folder, 'questions.part'), join(folder, 'questions.jsonl'))
process.stdout.write(`questions: ${join(folder, 'questions.jsonl')}\n`)
