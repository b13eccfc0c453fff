// Kinds of pages. Every kind is a function of a desk (parts, stream, names) and gives the HTML of the page's body.
import * as words from './words.mjs'
import { FONTS, FRAMEWORKS } from './frameworks.mjs'
import { Parts, tag } from './parts.mjs'
import { Stream } from './stream.mjs'

export const SIDE = 320 // pixels of a picture
const TEXT = [11.5, 12, 12, 12, 12.5, 12.5, 13, 13, 14] // pixels of body text

// Deals texts so that none comes twice on a page, in whatever list it stands.
export class Names {
  constructor(stream) {
    this.stream = stream
    this.used = new Set()
  }

  some(list, count) {
    const free = this.stream.shuffled(list).filter(word => !this.used.has(word.toLowerCase()))
    const dealt = free.slice(0, count)
    dealt.forEach(word => this.used.add(word.toLowerCase()))
    return dealt
  }

  next(list) {
    const [word] = this.some(list, 1)
    if (word === undefined) throw new Error('no word left')
    return word
  }
}

class Desk {
  constructor(parts, stream) {
    Object.assign(this, { p: parts, s: stream, names: new Names(stream) })
  }

  buttons(count, pictures = 0.2) {
    const looks = ['primary', 'button', 'quiet']
    return this.names.some(words.ACTIONS, count).map((text, at) =>
      this.p.button(text, {
        look: at ? this.s.choice(looks) : 'primary',
        picture: this.s.chance(pictures) ? this.names.next(Object.keys(words.ICONS)) : null,
      }),
    )
  }

  tools(count) {
    return this.names
      .some(Object.keys(words.ICONS), count)
      .map(name => this.p.button('', { look: 'quiet', picture: name }))
  }

  value() {
    const kind = this.s.integer(0, 5)
    if (kind === 0) return String(this.s.integer(2, 999))
    const lists = [words.NAMES, words.CITIES, words.ANIMALS, words.COLORS, words.MONTHS]
    return this.names.next(lists[kind - 1])
  }

  field() {
    const label = this.names.next(words.FIELDS)
    if (this.s.chance(0.3)) {
      const options = this.names.some(this.s.choice([words.ANIMALS, words.COLORS, words.CITIES]), 4)
      return this.p.select(label, options, this.s.choice(options))
    }
    return this.p.field(label, this.s.chance(0.8) ? this.value() : '')
  }

  checks(count, kind = 'check') {
    const ticked = this.s.choice([0.25, 0.5, 0.75])
    return this.names
      .some(words.CHECKS, count)
      .map(text => this.p.check(text, this.s.chance(ticked), kind))
  }

  radios() {
    const lists = [words.SIZES, words.LEVELS, words.COLORS, words.MONTHS]
    const options = this.names.some(this.s.choice(lists), this.s.integer(2, 3))
    return options.length > 1
      ? this.p.radios(this.names.next(words.FIELDS), options, this.s.choice(options))
      : ''
  }

  tabs(most = 4) {
    const texts = this.names.some(words.PLACES, this.s.integer(2, most))
    return this.p.tabs(texts, this.s.integer(0, texts.length - 1))
  }

  nav(count) {
    const texts = this.names.some(words.PLACES, count)
    const pictures = this.s.chance(0.35)
      ? this.names.some(Object.keys(words.ICONS), texts.length)
      : []
    return this.p.nav(texts, this.s.integer(0, texts.length - 1), pictures)
  }

  topBar() {
    const brand = tag('b', {}, this.names.next(words.BRANDS))
    const links = this.s.chance(0.5)
      ? this.names.some(words.PLACES, 2).map(text => this.p.link(text))
      : []
    return this.p.bar(
      this.dark,
      brand,
      ...links,
      tag('span', { class: 'push' }),
      ...this.tools(this.s.integer(1, 4)),
    )
  }

  table(rows, columns, actions = true) {
    const kinds = this.s.some(Object.keys(words.COLUMNS), columns)
    const people = this.names.some(words.NAMES, rows)
    const repeated = { status: this.s.some(words.STATUSES, 3), team: this.s.some(words.COLORS, 3) }
    repeated.status.concat(repeated.team).forEach(word => this.names.used.add(word.toLowerCase()))
    const cells = {
      city: () => this.names.next(words.CITIES),
      status: () => this.p.badge(this.s.choice(repeated.status)),
      count: () => String(this.s.integer(2, 99)),
      price: () => String(this.s.integer(100, 999)),
      month: () => this.s.choice(words.MONTHS).slice(0, 3),
      team: () => this.s.choice(repeated.team),
    }
    const picture = this.s.chance(0.5)
    const action = picture
      ? this.names.next(Object.keys(words.ICONS))
      : this.names.next(words.ACTIONS)
    const button = () =>
      picture
        ? this.p.button('', { look: 'quiet', picture: action })
        : this.p.button(action, { look: 'quiet' })
    const lines = people.map(person => [
      person,
      ...kinds.map(kind => cells[kind]()),
      ...(actions ? [button()] : []),
    ])
    const heads = ['Name', ...kinds.map(kind => words.COLUMNS[kind]), ...(actions ? [''] : [])]
    heads.forEach(word => this.names.used.add(word.toLowerCase()))
    return this.p.table(heads, lines, { striped: this.s.chance(0.5), bordered: this.s.chance(0.4) })
  }
}

// What fills the rest of a page, whatever its kind.
const FILLERS = [
  d => line(...d.tools(d.s.integer(3, 6))),
  d => line(...d.buttons(d.s.integer(3, 4))),
  d => grid(d.s.integer(2, 3), ...d.checks(d.s.integer(4, 6), d.s.choice(['check', 'switch']))),
  d => grid(d.s.integer(2, 3), ...times(d.s.integer(2, 6), () => d.field())),
  d => line(...d.names.some(words.PLACES, d.s.integer(3, 5)).map(text => d.p.link(text))),
  d => d.table(d.s.integer(2, 4), 2, d.s.chance(0.5)),
  d => d.radios(),
  d => d.tabs(4),
  d =>
    grid(
      3,
      ...d.names.some(words.STATS, 3).map(name => d.p.stat(name, String(d.s.integer(2, 9999)))),
    ),
  d =>
    line(
      d.p.pages(d.s.integer(3, 5), d.s.integer(0, 2)),
      tag('span', { class: 'push' }),
      ...d.buttons(1),
    ),
]

const filled = (d, count) => d.s.some(FILLERS, count).map(make => make(d))

const line = (...inner) => tag('div', { class: 'line' }, ...inner)
const grid = (columns, ...inner) =>
  tag('div', { class: 'grid', style: `grid-template-columns:repeat(${columns},1fr)` }, ...inner)
const times = (count, make) => Array.from({ length: count }, make)

export const KINDS = {
  form: d => [
    d.s.chance(0.5) ? d.topBar() : '',
    d.p.heading(d.names.next(words.HEADINGS)),
    grid(2, ...times(d.s.integer(4, 8), () => d.field())),
    d.s.chance(0.6) ? d.radios() : '',
    grid(2, ...d.checks(d.s.integer(2, 6))),
    line(...d.buttons(d.s.integer(2, 4))),
  ],

  table: d => [
    d.s.chance(0.4) ? d.topBar() : '',
    line(
      d.p.heading(d.names.next(words.HEADINGS)),
      tag('span', { class: 'push' }),
      ...d.tools(d.s.integer(1, 3)),
    ),
    d.s.chance(0.3) ? d.tabs() : '',
    d.table(d.s.integer(3, 8), d.s.integer(2, 3), d.s.chance(0.8)),
    line(
      ...d.buttons(d.s.integer(2, 3)),
      tag('span', { class: 'push' }),
      d.p.pages(d.s.integer(3, 5), d.s.integer(0, 2)),
    ),
  ],

  dashboard: d => {
    const stats = d.names
      .some(words.STATS, d.s.choice([2, 3, 4]))
      .map(n => d.p.stat(n, String(d.s.integer(2, 9999))))
    const main = [
      d.p.heading(d.names.next(words.HEADINGS)),
      grid(2, ...stats),
      d.s.chance(0.5)
        ? d.table(d.s.integer(2, 5), 1, false)
        : grid(1, ...d.checks(d.s.integer(2, 5), 'switch')),
      line(...d.buttons(d.s.integer(1, 2))),
    ]
    return [
      d.topBar(),
      tag(
        'div',
        { class: 'split' },
        tag('aside', {}, d.nav(d.s.integer(4, 8))),
        tag('main', {}, ...main),
      ),
    ]
  },

  list: d => {
    const picture = d.names.next(Object.keys(words.ICONS))
    const rows = d.names
      .some(words.NAMES, d.s.integer(4, 7))
      .map(name =>
        tag(
          'div',
          { role: 'listitem', class: 'item line' },
          tag('span', {}, tag('b', {}, name), '<br>', tag('small', {}, d.names.next(words.CITIES))),
          tag('span', { class: 'push' }),
          d.p.badge(d.s.choice(words.LEVELS)),
          d.p.button('', { look: 'quiet', picture }),
        ),
      )
    return [
      d.topBar(),
      d.s.chance(0.6) ? d.tabs(3) : '',
      tag('div', { role: 'list' }, ...rows),
      line(...d.buttons(2)),
    ]
  },

  menu: d => {
    const open = d.names.some(words.ACTIONS, d.s.integer(4, 7))
    const pictures = d.s.chance(0.4) ? d.names.some(Object.keys(words.ICONS), open.length) : []
    const left = [line(...d.tools(d.s.integer(3, 5))), d.nav(d.s.integer(4, 7))]
    const right = [
      d.p.menu(open, pictures),
      grid(1, ...d.checks(d.s.integer(1, 3))),
      line(...d.buttons(1)),
    ]
    return [
      d.topBar(),
      tag(
        'div',
        { class: 'split' },
        ...(d.s.chance(0.5) ? [left, right] : [right, left]).map(side => tag('main', {}, ...side)),
      ),
    ]
  },

  dialog: d => {
    const behind = d.s.chance(0.5)
      ? [d.table(6, 2, false)]
      : [grid(2, ...times(6, () => d.field()))]
    const asks = d.s.chance(0.5)
    const body = asks
      ? [tag('p', {}, 'Are you sure?'), ...d.checks(d.s.integer(1, 2))]
      : [grid(2, ...times(d.s.choice([2, 4]), () => d.field())), ...d.checks(d.s.integer(1, 3))]
    const title = asks ? d.s.choice(words.QUESTIONS) : d.names.next(words.HEADINGS)
    const buttons = d.names.some(words.ACTIONS, d.s.integer(2, 3)).map((text, at) =>
      d.p.button(text, {
        look: at ? 'button' : 'primary',
      }),
    )
    return [
      d.topBar(),
      d.tabs(3),
      ...behind,
      line(...d.buttons(2)),
      d.p.dialog(title, body, buttons),
    ]
  },

  settings: d => [
    d.s.chance(0.5) ? d.topBar() : '',
    d.tabs(4),
    d.p.heading(d.names.next(words.HEADINGS)),
    grid(d.s.integer(1, 2), ...d.checks(d.s.integer(4, 7), 'switch')),
    grid(2, ...times(d.s.choice([2, 4]), () => d.field())),
    d.radios(),
    d.s.chance(0.4) ? d.p.note(d.names.next(words.HEADINGS)) : '',
    line(...d.buttons(d.s.integer(2, 3))),
  ],

  shop: d => {
    const buy = d.names.next(words.ACTIONS)
    const heart = d.names.next(Object.keys(words.ICONS))
    const goods = d.names
      .some(words.PRODUCTS, d.s.choice([4, 6]))
      .map(name =>
        d.p.card(
          name,
          tag(
            'div',
            { 'data-pair': name },
            tag('small', {}, d.s.choice(words.COLORS)),
            ' ',
            tag('b', {}, String(d.s.integer(5, 99))),
          ),
          line(
            d.p.button(buy, { look: 'primary' }),
            d.p.button('', { look: 'quiet', picture: heart }),
          ),
        ),
      )
    return [
      d.topBar(),
      line(
        ...d.checks(d.s.integer(1, 2)),
        d.s.chance(0.5)
          ? d.names
              .some(words.PLACES, 2)
              .map(text => d.p.link(text))
              .join(' ')
          : '',
      ),
      grid(goods.length > 4 || d.s.chance(0.4) ? 3 : 2, ...goods),
      line(...d.buttons(2)),
    ]
  },
}

const LAYOUT = `*,*:before,*:after{animation:none!important;transition:none!important;caret-color:transparent!important}
  html,body{margin:0!important;padding:0!important;overflow:hidden!important;height:100%!important;min-height:0!important}
  #page{padding:6px;height:100%;box-sizing:border-box;overflow:hidden;position:relative}
  #page>*{margin-bottom:6px!important} .line{display:flex;align-items:center;gap:5px;flex-wrap:wrap}
  .line.end{justify-content:flex-end} .push{flex:1} .grid{display:grid;gap:5px;align-items:start}
  .field label{display:block} .field input,.field select{width:100%!important;max-width:100%;box-sizing:border-box}
  .bar{display:flex!important;align-items:center;gap:8px;min-height:0!important;flex-wrap:nowrap!important}
  .split{display:grid;grid-template-columns:38fr 62fr;gap:8px} main,aside{padding:0!important;min-width:0}
  main>*,aside>*{margin-bottom:6px!important} .s-row{display:flex!important;flex-wrap:wrap!important;flex-direction:row!important} .s-col{display:block!important}
  .head{font-size:1.2em!important;line-height:1.2!important;margin:2px 0!important;padding:0!important}
  h2,p{margin:0!important} .ic{width:max(1.3em,14px);height:max(1.3em,14px);vertical-align:-.25em;display:inline-block;flex:none}
  .item{border-bottom:1px solid rgba(128,128,128,.35);padding:2px 0} .choice{display:block!important}
  .shade{position:absolute;inset:0;background:rgba(0,0,0,.45);display:flex;align-items:center;justify-content:center;
  margin:0!important;z-index:50} .dialog{width:82%;max-width:82%;margin:0!important;padding:0;background-clip:padding-box}
  .cardhead{font-size:1em!important;line-height:1.25!important;margin:0 0 2px!important} .tick{white-space:nowrap}
  table{width:100%;line-height:1.25} .cardbox{margin:0!important;min-width:0;overflow:hidden}
  input,select{text-overflow:clip} button{white-space:nowrap;line-height:1.4!important}`

// The whole HTML document of a page, with the width of its window in CSS pixels and facts for the record.
export function makePage(modules, ...key) {
  const stream = new Stream('page', ...key)
  const name = stream.choice(Object.keys(FRAMEWORKS))
  const framework = FRAMEWORKS[name]
  const kind = stream.choice(Object.keys(KINDS))
  const font = stream.choice(Object.keys(FONTS))
  const text = stream.choice(TEXT)
  const dark = Boolean(framework.dark || framework.darkClass) && stream.chance(0.5)
  const parts = new Parts(framework, modules, stream, stream.choice(['bootstrap', 'lucide']))
  const desk = Object.assign(new Desk(parts, stream), { dark })
  const body = [...KINDS[kind](desk), ...filled(desk, 4)].join('\n')
  const width = Math.round((SIDE * framework.text) / text)
  const scheme = dark ? (framework.dark ?? {}) : (framework.light ?? {})
  const css = [
    ...framework.css,
    ...[400, 700].map(weight => `@fontsource/${FONTS[font]}/latin-${weight}.css`),
  ]
  const links = css.map(file => `<link rel="stylesheet" href="/modules/${file}">`).join('')
  const type = `body,button,input,select,textarea,label,h2,.pf-v6-c-form-control *{font-family:"${font}",sans-serif!important}`
  const root = tag(
    'html',
    { lang: 'en', class: dark ? framework.darkClass : null, ...scheme },
    `<head><meta charset="utf-8">${links}<style>${LAYOUT} ${type} ${framework.extra ?? ''}</style></head>`,
    tag('body', { class: framework.body }, tag('div', { id: 'page' }, body)),
  )
  return {
    html: `<!doctype html>${root}`,
    width,
    facts: { framework: name, kind, dark, font, text },
  }
}
