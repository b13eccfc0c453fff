// node words.mjs > tiny/words.txt    every word of the training pages and of the questions about them, sorted
import * as lists from './lib/words.mjs'

// What pages.mjs and ask.mjs write beside the lists: short months, a dialog's text, the questions.
const MORE = `jan feb mar apr may jun jul aug sep oct nov dec are you sure the click press open choose switch is of icon
  ticked how many has boxes box left right button field say not there which chosen above below does on rows fields tabs
  for tab switches what list in row menu item items active page yes no`

const words = new Set()
const add = text => {
  for (const word of text.toLowerCase().split(/[^a-z]+/)) if (word.length > 1) words.add(word)
}
add(MORE)
for (const value of Object.values(lists)) {
  if (Array.isArray(value)) value.forEach(add)
  else if (typeof value === 'object') Object.entries(value).flat().filter(x => typeof x === 'string').forEach(add)
}
console.log([...words].sort().join('\n'))
