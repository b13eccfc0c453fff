// Questions about a page, from what `extract` read. A question has one answer; what is not unique is not asked.
import { lower, Screen, within, WORD } from './screen.mjs'
import { Stream } from './stream.mjs'

export const FAMILIES = ['text', 'icon', 'field', 'relation', 'value', 'state', 'count', 'neighbor']
export const POINTING = FAMILIES.slice(0, 4) // their answer is a box
const MOST = 3 // questions of a family about a page

const point = (family, text, element, more = []) => ({
  family,
  text,
  answer: '',
  box: element.box,
  more,
})
const read = (family, text, answer, box, more = []) => ({
  family,
  text,
  answer: String(answer),
  box,
  more,
})
const isTicks = e => e.checked !== null
const isField = e => e.role === 'field' || e.role === 'select'

function askText(screen, s) {
  const verbs = {
    button: ['click', 'press'],
    tab: ['open', 'click'],
    menuitem: ['open', 'click'],
    link: ['open', 'click'],
  }
  return screen
    .named()
    .filter(e => verbs[e.role] && !e.disabled)
    .map(e => point('text', `${s.choice(verbs[e.role])} ${e.text}`, e))
}

function askIcon(screen, s) {
  return screen.free
    .filter(
      e =>
        e.icons.length === 1 &&
        !e.text &&
        /^[a-z]+$/.test(e.icons[0]) &&
        screen.known(e.icons[0]) &&
        screen.pictures.get(e.icons[0]) === 1,
    )
    .map(e => point('icon', `${s.choice(['click', 'press'])} the ${e.icons[0]} icon`, e))
}

function askField(screen) {
  const verb = e =>
    isTicks(e)
      ? ({ radio: 'choose', switch: 'switch' }[e.role] ?? 'click the box')
      : e.role === 'select'
        ? 'open the list'
        : 'click the field'
  return screen
    .labelled()
    .filter(e => (isField(e) || isTicks(e)) && !e.disabled)
    .map(e => point('field', `${verb(e)} ${e.label}`, e, screen.places(e.label)))
}

function askRelation(screen, s) {
  const asked = []
  for (const { key, clear, kind, elements, box } of screen.containers) {
    const inside = elements
      .map(at => screen.elements[at])
      .filter(e => !e.cut && !e.covered && e.role === 'button')
    if (!clear || !screen.names(key)) continue
    for (const e of inside) {
      const same = other =>
        other !== e && lower(other.text) === lower(e.text) && other.icons.join() === e.icons.join()
      const what = e.text
        ? e.text
        : e.icons.length === 1 && screen.known(e.icons[0])
          ? `the ${e.icons[0]} icon`
          : ''
      if (
        !what ||
        (e.text && !WORD.test(e.text)) ||
        inside.some(same) ||
        !screen.elements.some(same)
      )
        continue
      asked.push(
        point('relation', `click ${what} ${kind === 'row' ? 'in the row of' : 'of'} ${key}`, e, [
          box,
        ]),
      )
    }
  }
  const anchors = screen.named().filter(e => /^(button|tab|menuitem|link)$/.test(e.role))
  for (const anchor of anchors) {
    const side = s.choice(['left', 'right'])
    const target = screen.next(anchor.box, side, 40)
    if (target?.role === 'button')
      asked.push(
        point('relation', `click the button ${side} of ${anchor.text}`, target, [anchor.box]),
      )
  }
  return asked
}

function askValue(screen) {
  const asked = []
  const short = text => text && text.length <= 20 && text.split(' ').length <= 2 && WORD.test(text)
  for (const e of screen.labelled().filter(isField)) {
    if (!e.fits || !short(e.value) || e.placeholder) continue
    const text =
      e.role === 'select' ? `what is chosen in ${e.label}?` : `what does the field ${e.label} say?`
    asked.push(read('value', text, e.value, e.box, screen.places(e.label)))
  }
  for (const table of screen.tables) {
    const { heads } = table
    for (const row of table.rows) {
      const [key, ...cells] = row.cells
      if (!key?.whole || !screen.names(key.text)) continue
      cells.forEach((cell, at) => {
        // A head outside the picture names nothing.
        const top = heads[at + 1]?.box ?? [0, -1]
        const head = top[1] >= 0 ? heads[at + 1].text : undefined
        const once =
          head &&
          heads.filter(h => lower(h.text) === lower(head)).length === 1 &&
          screen.tables.length === 1
        if (
          !once ||
          !cell.whole ||
          !short(cell.text) ||
          !screen.clear(cell.text, cell.box) ||
          !screen.clear(key.text, key.box)
        )
          return
        asked.push(
          read('value', `what is the ${lower(head)} of ${key.text}?`, cell.text, cell.box, [
            key.box,
            heads[at + 1].box,
          ]),
        )
      })
    }
  }
  for (const pair of screen.pairs) {
    if (
      !pair.whole ||
      !screen.names(pair.name) ||
      !short(pair.value) ||
      !screen.clear(pair.value, pair.box, screen.places(pair.name))
    )
      continue
    asked.push(
      read(
        'value',
        `what number has ${pair.name}?`,
        pair.value,
        pair.box,
        screen.places(pair.name),
      ),
    )
  }
  return asked
}

function askState(screen) {
  const labelled = screen.labelled()
  const ticks = labelled
    .filter(e => e.role === 'checkbox' || e.role === 'switch')
    .map(e =>
      read(
        'state',
        e.role === 'switch' ? `is ${e.label} on?` : `is ${e.label} ticked?`,
        e.checked ? 'yes' : 'no',
        e.box,
      ),
    )
  const which = []
  const once = kind =>
    screen.groups.filter(group => group.kind === kind && group.elements.length > 1)
  const texts = {
    tabs: 'which tab is open?',
    nav: 'which menu item is active?',
    pages: 'which page is open?',
  }
  for (const kind of Object.keys(texts)) {
    const groups = once(kind)
    if (groups.length !== 1) continue
    const active = groups[0].elements.map(at => screen.elements[at]).filter(e => e.active)
    if (
      active.length !== 1 ||
      active[0].cut ||
      active[0].covered ||
      !active[0].clear ||
      !WORD.test(active[0].text)
    )
      continue
    which.push(read('state', texts[kind], active[0].text, active[0].box))
  }
  for (const group of once('radios')) {
    const options = group.elements.map(at => screen.elements[at])
    const chosen = options.filter(e => e.checked)
    if (
      !screen.names(group.label) ||
      chosen.length !== 1 ||
      !group.whole ||
      options.some(e => e.cut || e.covered)
    )
      continue
    which.push(
      read(
        'state',
        `what is chosen for ${group.label}?`,
        chosen[0].label,
        chosen[0].box,
        screen.places(group.label),
      ),
    )
  }
  return { ticks, which }
}

function askCount(screen) {
  const asked = []
  const around = boxes => [
    Math.min(...boxes.map(b => b[0])),
    Math.min(...boxes.map(b => b[1])),
    Math.max(...boxes.map(b => b[2])),
    Math.max(...boxes.map(b => b[3])),
  ]
  const all = (text, elements, some = elements) => {
    const partial = elements.some(e => e.cut || e.covered)
    if (partial || !elements.length) return
    const boxes = (some.length ? some : elements).map(e => e.box)
    asked.push(read('count', text, some.length, around(boxes), boxes))
  }
  if (screen.tables.length === 1 && screen.tables[0].whole && screen.tables[0].rows.length) {
    const [{ rows, heads }] = screen.tables
    const hidden = screen.runs.some(
      run => run.covered && rows.some(row => within(run.box, row.box)),
    )
    if (!hidden) {
      asked.push(
        read(
          'count',
          'how many rows has the table?',
          rows.length,
          around(rows.map(r => r.box)),
          rows.map(r => r.box),
        ),
      )
      const at = heads.findIndex(h => /^(status|team)$/i.test(h.text))
      const texts =
        at < 0
          ? []
          : [...new Set(rows.map(row => row.cells[at]?.text))].filter(
              text => text && WORD.test(text),
            )
      for (const text of texts) {
        const alike = rows.filter(row => row.cells[at]?.text === text).map(r => r.box)
        asked.push(read('count', `how many rows say ${text}?`, alike.length, around(alike), alike))
      }
    }
  }
  const boxes = screen.elements.filter(e => e.role === 'checkbox')
  all(
    'how many boxes are ticked?',
    boxes,
    boxes.filter(e => e.checked),
  )
  all(
    'how many boxes are not ticked?',
    boxes,
    boxes.filter(e => !e.checked),
  )
  const switches = screen.elements.filter(e => e.role === 'switch')
  all(
    'how many switches are on?',
    switches,
    switches.filter(e => e.checked),
  )
  const tabs = screen.groups.filter(group => group.kind === 'tabs')
  if (tabs.length === 1)
    all(
      'how many tabs are there?',
      tabs[0].elements.map(at => screen.elements[at]),
    )
  const navs = screen.groups.filter(group => group.kind === 'nav' || group.kind === 'menu')
  if (navs.length === 1)
    all(
      'how many items has the menu?',
      navs[0].elements.map(at => screen.elements[at]),
    )
  all('how many fields are there?', screen.elements.filter(isField))
  return asked
}

function askNeighbor(screen, s) {
  const anchors = screen.named().filter(e => /^(button|tab|menuitem|link)$/.test(e.role))
  const asked = []
  for (const anchor of anchors) {
    const side = s.choice(['left', 'right', 'above', 'below'])
    const target = screen.next(anchor.box, side, side === 'left' || side === 'right' ? 60 : 16)
    const named = /^(button|tab|menuitem|link|checkbox|switch|radio)$/.test(target?.role ?? '')
    if (
      !named ||
      !target.text ||
      !target.clear ||
      target.icons.length > 1 ||
      !WORD.test(target.text)
    )
      continue
    if (target.text.split(' ').length > 2 || target.text.length > 20) continue
    const place = side === 'left' || side === 'right' ? `${side} of` : side
    asked.push(
      read('neighbor', `what is ${place} ${anchor.text}?`, target.text, target.box, [anchor.box]),
    )
  }
  return asked
}

// At most `MOST` questions of each family, all different, with boxes in whole pixels inside the picture.
export function ask(shown, icons, ...key) {
  const stream = new Stream('ask', ...key)
  const screen = new Screen(shown)
  screen.known = name => icons.includes(name)
  // A text stands in full, uncovered, inside a box.
  screen.clear = (text, box) => {
    const inside = shown.runs.filter(run => within(run.box, box))
    return (
      inside.length > 0 &&
      inside.every(run => !run.covered && !run.cut) &&
      lower(inside.map(run => run.text.trim()).join(' ')) === lower(text)
    )
  }
  const pick = some => stream.some(some, MOST)
  // Yes, no and a name are equally likely, whatever the page has more of.
  const { ticks, which } = askState(screen)
  const [yes, no] = ['yes', 'no'].map(answer =>
    ticks.filter(question => question.answer === answer),
  )
  const kinds = [yes, no, which].filter(some => some.length)
  const state = kinds.map(some => stream.choice(some))
  const lists = [
    askText(screen, stream),
    askIcon(screen, stream),
    askField(screen),
    askRelation(screen, stream),
    askValue(screen),
    stream.shuffled(state),
    balanced(askCount(screen), stream),
    askNeighbor(screen, stream),
  ]
  return lists.flatMap(pick).map(question => ({ ...question, ...whole(question, shown.size) }))
}

// One question for each number, so that small numbers are not asked for more often than large ones.
function balanced(questions, stream) {
  const numbers = [...new Set(questions.map(question => question.answer))]
  return numbers.map(number =>
    stream.choice(questions.filter(question => question.answer === number)),
  )
}

function whole(question, [width, height]) {
  const clean = ([x1, y1, x2, y2]) => [
    Math.max(0, Math.round(x1)),
    Math.max(0, Math.round(y1)),
    Math.min(width, Math.round(x2)),
    Math.min(height, Math.round(y2)),
  ]
  return { box: clean(question.box), more: question.more.map(clean) }
}
