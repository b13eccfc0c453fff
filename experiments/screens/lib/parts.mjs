// HTML of the parts of a page, in the markup of a framework. Roles and states are written as ARIA says.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { ICONS } from './words.mjs'

const SETS = { bootstrap: ['bootstrap-icons', 'icons'], lucide: ['lucide-static', 'icons'] }
const drawings = new Map()

// The drawing of an icon as inline SVG.
export function icon(modules, set, name) {
  const key = `${set}/${name}`
  if (!drawings.has(key)) {
    const file = join(modules, ...SETS[set], `${ICONS[name][set]}.svg`)
    const svg = readFileSync(file, 'utf8')
      .replace(/<!--.*?-->/gs, '')
      .replace(/\s+/g, ' ')
    const bare = svg.replace(/ (class|width|height)="[^"]*"/g, (text, name, at) =>
      at < svg.indexOf('>') ? '' : text,
    )
    drawings.set(
      key,
      bare.replace('<svg', `<svg class="ic" data-icon="${name}" aria-hidden="true"`),
    )
  }
  return drawings.get(key)
}

const attributes = pairs =>
  Object.entries(pairs)
    .filter(([, value]) => value !== null && value !== undefined && value !== false && value !== '')
    .map(([name, value]) => (value === true ? ` ${name}` : ` ${name}="${value}"`))
    .join('')

export const tag = (name, pairs, ...inner) =>
  `<${name}${attributes(pairs)}>${inner.join('')}</${name}>`

export class Parts {
  constructor(framework, modules, stream, iconSet) {
    Object.assign(this, { f: framework, modules, stream, iconSet, ids: 0 })
  }

  icon(name) {
    return icon(this.modules, this.iconSet, name)
  }

  id() {
    return `e${this.ids++}`
  }

  button(text, { look = 'button', picture = null, disabled = false } = {}) {
    const inner = picture ? [this.icon(picture), text ? ` ${text}` : ''] : [text]
    const label = text ? null : picture
    return tag(
      'button',
      { type: 'button', class: this.f[look], 'aria-label': label, disabled },
      ...inner,
    )
  }

  link(text) {
    return tag('a', { href: '#', class: 'plain' }, text)
  }

  field(label, value, { placeholder = '' } = {}) {
    const id = this.id()
    const input = `<input${attributes({ id, type: 'text', class: this.f.input, value, placeholder })}>`
    const inner = this.f.inputWrap
      ? tag('div', { class: this.f.inputWrap, style: 'width:100%' }, input)
      : input
    return tag(
      'div',
      { class: 'field' },
      tag('label', { for: id, class: this.f.label }, label),
      inner,
    )
  }

  select(label, options, chosen) {
    const id = this.id()
    const list = options.map(o => `<option${o === chosen ? ' selected' : ''}>${o}</option>`)
    const select = tag('select', { id, class: this.f.select }, ...list)
    const inner = this.f.selectWrap
      ? tag('div', { class: this.f.selectWrap, style: 'width:100%' }, select)
      : select
    return tag(
      'div',
      { class: 'field' },
      tag('label', { for: id, class: this.f.label }, label),
      inner,
    )
  }

  // A box to tick (`kind` check), one of several (radio), or a switch where the framework draws one.
  check(label, ticked, kind = 'check', group = '') {
    const look = (kind === 'switch' && this.f.switch) || this.f.check || {}
    const radio = kind === 'radio'
    const role = kind === 'switch' && this.f.switch ? 'switch' : null
    const id = this.id()
    const input = `<input${attributes({
      id,
      role,
      type: radio ? 'radio' : 'checkbox',
      name: group || id,
      checked: ticked,
      class: (radio && look.radio) || look.input,
    })}>`
    const wrap = (radio && look.radioWrap) || look.wrap
    if (look.nested)
      return tag('label', { class: wrap }, input, '<i class="form-icon"></i> ', label)
    const text = tag('label', { for: id, class: (radio && look.radioLabel) || look.label }, label)
    const outer = (radio && look.radioGroup) || look.group
    const line = tag('div', { class: `tick ${wrap ?? ''}` }, input, text)
    return outer ? tag('div', { class: outer }, line) : line
  }

  radios(label, options, chosen) {
    const group = this.id()
    const list = options.map(o => this.check(o, o === chosen, 'radio', group))
    return tag(
      'div',
      { role: 'radiogroup', 'aria-label': label },
      tag('div', { class: this.f.label }, label),
      tag('div', { class: 'line' }, ...list),
    )
  }

  // A list of which one item is active: tabs, a menu, or page numbers.
  items(
    part,
    texts,
    active,
    { role = null, flow = 's-row', mark = 'aria-current', pictures = [] } = {},
  ) {
    const look = this.f[part]
    const lines = texts.map((text, at) => {
      const on = at === active
      const classes = place =>
        [look[place], on && look.on === place ? look.active : ''].filter(Boolean).join(' ')
      const state = { [mark]: mark === 'aria-selected' ? String(on) : on ? 'page' : null }
      const picture = pictures[at] ? `${this.icon(pictures[at])} ` : ''
      const itemState = look.itemRole
        ? { role: look.itemRole, ...state }
        : { role: role && 'presentation' }
      const link = tag(
        'a',
        {
          href: '#',
          class: classes('link'),
          role: look.itemRole ? null : role,
          ...(look.itemRole ? {} : state),
        },
        picture,
        text,
      )
      return look.item === null ? link : tag('li', { class: classes('item'), ...itemState }, link)
    })
    const list = tag(
      look.inner ? 'ul' : (look.tag ?? 'ul'),
      { class: `${look.inner ? '' : look.list} ${flow}`, role: role === 'tab' ? 'tablist' : null },
      ...lines,
    )
    const outer = look.inner ? look.list : look.outer
    return outer ? tag('div', { class: outer }, list) : list
  }

  tabs(texts, active) {
    return this.items('tabs', texts, active, { role: 'tab', mark: 'aria-selected' })
  }

  nav(texts, active, pictures = []) {
    return tag('nav', {}, this.items('nav', texts, active, { flow: 'col', pictures }))
  }

  pages(count, active) {
    const numbers = Array.from({ length: count }, (_, i) => String(i + 1))
    return this.items('pages', numbers, active)
  }

  menu(texts, pictures = []) {
    const look = this.f.menu
    const lines = texts.map((text, at) =>
      tag(
        'a',
        { href: '#', role: 'menuitem', class: `choice ${look.item}` },
        pictures[at] ? `${this.icon(pictures[at])} ` : '',
        text,
      ),
    )
    return tag('div', { role: 'menu', class: look.list }, ...lines)
  }

  table(headers, rows, { striped = false, bordered = false } = {}) {
    const { f } = this
    const classes = [f.table, striped ? f.striped : '', bordered ? f.bordered : '']
      .filter(Boolean)
      .join(' ')
    const head = tag('tr', { class: f.tr }, ...headers.map(h => tag('th', { class: f.th }, h)))
    const body = rows.map(row =>
      tag('tr', { class: f.tr }, ...row.map(cell => tag('td', { class: f.td }, cell))),
    )
    return tag(
      'table',
      { class: classes },
      tag('thead', { class: f.thead }, head),
      tag('tbody', {}, ...body),
    )
  }

  card(title, ...inner) {
    const { card } = this.f
    const head = title ? [tag('div', { class: `cardhead ${card.title}` }, title)] : []
    return tag(
      card.tag ?? 'div',
      { class: `${card.box} cardbox` },
      tag('div', { class: card.body }, ...head, ...inner),
    )
  }

  stat(name, value) {
    return this.card(
      '',
      tag('div', { 'data-pair': true }, tag('small', {}, name), '<br>', tag('b', {}, value)),
    )
  }

  badge(text) {
    return tag(this.f.badgeTag ?? 'span', { class: this.f.badge }, text)
  }

  note(text) {
    return tag('div', { class: this.f.alert, style: 'grid-column:1/-1' }, text)
  }

  heading(text) {
    return tag('h2', { class: 'head' }, text)
  }

  bar(dark, ...inner) {
    return tag('header', { class: `bar ${(dark && this.f.barDark) || this.f.bar}` }, ...inner)
  }

  dialog(title, body, buttons) {
    const { dialog } = this.f
    const head = tag('div', { class: dialog.head }, tag('div', { class: dialog.title }, title))
    const foot = tag('div', { class: `${dialog.foot} line end` }, ...buttons)
    const box = tag(
      dialog.tag ?? 'div',
      { class: `${dialog.box} dialog`, role: 'dialog', 'aria-label': title },
      head,
      tag('div', { class: dialog.body }, ...body),
      foot,
    )
    return tag('div', { class: 'shade' }, box)
  }
}
