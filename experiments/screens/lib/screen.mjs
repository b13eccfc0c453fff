// What is on a page, with the look-ups that questions need.
export const WORD = /^[A-Za-z0-9][A-Za-z0-9 '&?.:%$€,/+-]*$/ // texts that can be asked for
// What icon fonts call the icons that we have a name for.
const ALIASES = {
  cog: 'gear',
  cogs: 'gear',
  settings: 'gear',
  home: 'house',
  pen: 'pencil',
  'pencil-alt': 'pencil',
  edit: 'pencil',
  'edit-2': 'pencil',
  'edit-3': 'pencil',
  times: 'cross',
  x: 'cross',
  close: 'cross',
  bars: 'menu',
  'trash-alt': 'trash',
  'trash-2': 'trash',
  'shopping-cart': 'cart',
  sync: 'refresh',
  'sync-alt': 'refresh',
  'refresh-cw': 'refresh',
  'th-large': 'grid',
  mail: 'envelope',
  'calendar-alt': 'calendar',
  'share-alt': 'share',
  'map-marker-alt': 'pin',
  'user-alt': 'person',
  user: 'person',
  'file-image': 'image',
  undo: 'undo',
  'search-plus': '?',
  print: 'printer',
  'phone-alt': 'phone',
  'shield-alt': 'shield',
  'book-open': 'book',
}
export const lower = text => text.trim().toLowerCase()

export class Screen {
  constructor(shown) {
    const elements = shown.elements.map(e => ({
      ...e,
      icons: e.icons.map(name => ALIASES[name] ?? name),
    }))
    Object.assign(this, shown, { elements })
    this.free = elements.filter(e => !e.covered && !e.cut)
    const parts = new Map()
    for (const run of shown.runs) parts.set(run.part, `${parts.get(run.part) ?? ''} ${run.text}`)
    const texts = [...parts.values(), ...elements.map(e => e.text)].map(t =>
      lower(t.replace(/\s+/g, ' ')),
    )
    this.times = new Map()
    for (const text of new Set(texts)) this.times.set(text, 0)
    // An element and the one text in it are the same words once.
    for (const text of [...parts.values()]) this.add(lower(text.replace(/\s+/g, ' ')))
    this.pictures = new Map()
    for (const name of elements.flatMap(e => e.icons))
      this.pictures.set(name, (this.pictures.get(name) ?? 0) + 1)
    this.plainRuns = shown.runs.filter(run => !run.covered && !run.cut)
  }

  add(text) {
    this.times.set(text, (this.times.get(text) ?? 0) + 1)
  }

  // Whether a text can name a thing: short, plain, and on the page once.
  names(text) {
    const words = text.split(' ')
    return (
      text.length >= 2 &&
      text.length <= 24 &&
      words.length <= 3 &&
      WORD.test(text) &&
      !/^\d+$/.test(text) &&
      (this.times.get(lower(text)) ?? 0) <= 1
    )
  }

  // Boxes of the runs that make a text; none where it does not stand on its own.
  places(text) {
    const parts = new Map()
    for (const run of this.plainRuns) parts.set(run.part, [...(parts.get(run.part) ?? []), run])
    const alike = [...parts.values()].find(
      some =>
        lower(
          some
            .map(run => run.text)
            .join(' ')
            .replace(/\s+/g, ' '),
        ) === lower(text),
    )
    return (alike ?? []).map(run => run.box)
  }

  // Elements that their own text names.
  named() {
    return this.free.filter(
      e =>
        e.text &&
        e.clear &&
        e.pieces <= 1 &&
        this.names(e.text) &&
        this.times.get(lower(e.text)) === 1,
    )
  }

  // Elements that their label names.
  labelled() {
    return this.free.filter(
      e =>
        e.label &&
        this.names(e.label) &&
        this.times.get(lower(e.label)) === 1 &&
        this.plainRuns.some(run => lower(run.text) === lower(e.label)),
    )
  }

  // The only thing next to a box on one side, or nothing.
  next(box, side, reach) {
    const across = side === 'left' || side === 'right'
    const [low, high] = across ? [1, 3] : [0, 2]
    const [near, far] =
      side === 'right' || side === 'below'
        ? [across ? 2 : 3, across ? 0 : 1]
        : [across ? 0 : 1, across ? 2 : 3]
    const sign = side === 'right' || side === 'below' ? 1 : -1
    const loose = this.runs.filter(run => run.owner < 0)
    const others = [...this.elements, ...loose].filter(o => o.box !== box)
    const beside = others
      .map(o => {
        const overlap = Math.min(o.box[high], box[high]) - Math.max(o.box[low], box[low])
        const size = Math.min(o.box[high] - o.box[low], box[high] - box[low])
        return { thing: o, gap: sign * (o.box[far] - box[near]), share: overlap / size }
      })
      .filter(b => b.share > 0.15 && b.gap > -2)
      .sort((a, b) => a.gap - b.gap)
    const [first, second] = beside
    if (!first || first.gap > reach || (second && second.gap - first.gap < 5)) return null
    const middle = b => (b[low] + b[high]) / 2
    const aligned =
      Math.abs(middle(first.thing.box) - middle(box)) < 6 ||
      (!across && Math.abs(first.thing.box[0] - box[0]) < 6)
    const thing = first.thing
    return aligned && first.share > 0.5 && !thing.cut && !thing.covered ? thing : null
  }
}

export const within = (a, b) =>
  a[0] >= b[0] - 2 && a[1] >= b[1] - 2 && a[2] <= b[2] + 2 && a[3] <= b[3] + 2
