// What a page shows, read from its DOM. `extract` runs inside the browser, so it may use nothing from this file's outside.
// Elements, texts, tables and groups come back with boxes in CSS pixels relative to the region; `cut` says that a thing
// does not lie wholly inside the region, `covered` that something else is drawn over it.
export function extract(region) {
  const view = region ?? { x: 0, y: 0, width: innerWidth, height: innerHeight }
  const round = value => Math.round(value * 100) / 100
  const boxOf = r => [
    round(r.left - view.x),
    round(r.top - view.y),
    round(r.right - view.x),
    round(r.bottom - view.y),
  ]
  const plain = text => text.replace(/\s+/g, ' ').trim()
  const seen = node => node.checkVisibility({ opacityProperty: true, visibilityProperty: true })
  const outside = box =>
    box[0] < -0.3 || box[1] < -0.3 || box[2] > view.width + 0.3 || box[3] > view.height + 0.3
  const away = box => box[2] <= 0 || box[3] <= 0 || box[0] >= view.width || box[1] >= view.height
  const hit = (x, y) => document.elementFromPoint(x + view.x, y + view.y)

  // --- text: one run for each line of each text node, with the edges of its characters
  const runs = []
  const clipped = node => {
    for (let at = node; at && at !== document.body; at = at.parentElement) {
      const style = getComputedStyle(at)
      const hides = style.overflowX !== 'visible' && at.clientWidth
      if (hides && style.textOverflow === 'ellipsis' && at.scrollWidth > at.clientWidth) return true
    }
    return false
  }
  // Whether text hardly differs from what is behind it (WCAG contrast below 1.8).
  const channels = color => (color.match(/[\d.]+/g) ?? []).map(Number)
  const light = ([r, g, b]) =>
    [r, g, b]
      .map(v => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4))
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const faint = node => {
    const style = getComputedStyle(node)
    if (!style.color.startsWith('rgb')) return false
    for (let at = node; at; at = at.parentElement) {
      const behind = getComputedStyle(at)
      if (behind.backgroundImage !== 'none' || !behind.backgroundColor.startsWith('rgb'))
        return false
      const back = channels(behind.backgroundColor)
      if (back.length === 4 && back[3] < 0.5) continue
      const [a, b] = [light(channels(style.color)), light(back)].sort((x, y) => y - x)
      return (a + 0.05) / (b + 0.05) < 1.8
    }
    return light(channels(style.color)) > 0.7
  }
  const coveredText = (node, run) => {
    const y = (run.y1 + run.y2) / 2
    const middles = run.xs.slice(1).map((x, i) => (x + run.xs[i]) / 2)
    return [middles[0], middles[middles.length >> 1], middles.at(-1)].some(x => {
      const top = hit(x, y)
      const through = getComputedStyle(node).pointerEvents === 'none' && top?.contains(node)
      return !(top && (node.contains(top) || through))
    })
  }
  const addRun = (node, run) => {
    const box = [run.xs[0], run.y1, run.xs.at(-1), run.y2]
    if (away(box)) return
    const size = round(parseFloat(getComputedStyle(node).fontSize))
    const covered = Boolean(run.covered) || clipped(node) || coveredText(node, run) || faint(node)
    runs.push({ ...run, size, covered, cut: outside(box), box, node })
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  const range = document.createRange()
  let nodes = 0
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const parent = text.parentElement
    if (
      !plain(text.data) ||
      /^(SCRIPT|STYLE|NOSCRIPT|OPTION|TEXTAREA|TITLE)$/.test(parent.tagName) ||
      !seen(parent)
    )
      continue
    range.selectNodeContents(text)
    if (away(boxOf(range.getBoundingClientRect()))) continue
    nodes++
    const upper = getComputedStyle(parent).textTransform
    const shown = upper === 'uppercase' ? text.data.toUpperCase() : text.data
    let run = null
    for (let i = 0; i < text.data.length; i++) {
      range.setStart(text, i)
      range.setEnd(text, i + 1)
      const rect = range.getClientRects()[0]
      if (!rect || !rect.width) continue
      const [x1, y1, x2, y2] = boxOf(rect)
      if (!run || Math.abs(y1 - run.y1) > 3 || x1 < run.xs.at(-1) - 3) {
        if (run && run.text.trim()) addRun(parent, run)
        run = { text: '', xs: [x1], y1, y2, part: nodes }
      }
      run.text += shown[i]
      run.xs.push(x2)
    }
    if (run && run.text.trim()) addRun(parent, run)
  }

  // --- the text in fields is no text node: its characters are measured
  const pen = document.createElement('canvas').getContext('2d')
  const fieldText = node => {
    const value =
      node.tagName === 'SELECT' ? plain(node.selectedOptions[0]?.textContent ?? '') : node.value
    const shown = value || node.placeholder || ''
    if (!shown || node.type === 'password') return { value, fits: true }
    const style = getComputedStyle(node)
    const number = name => parseFloat(style[name]) || 0
    pen.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`
    const [left, top, right, bottom] = boxOf(node.getBoundingClientRect())
    const start =
      left +
      number('borderLeftWidth') +
      number('paddingLeft') +
      (node.tagName === 'SELECT' ? 0.5 : 0)
    const end = right - number('borderRightWidth') - number('paddingRight')
    const xs = Array.from({ length: shown.length + 1 }, (_, i) =>
      round(start + pen.measureText(shown.slice(0, i)).width),
    )
    const inner = [
      top + number('borderTopWidth') + number('paddingTop'),
      bottom - number('borderBottomWidth') - number('paddingBottom'),
    ]
    const half = parseFloat(style.fontSize) * 0.6
    const middle = (inner[0] + inner[1]) / 2
    const fits = xs.at(-1) <= end + 1
    const run = {
      text: shown,
      xs,
      y1: round(middle - half),
      y2: round(middle + half),
      part: ++nodes,
      covered: !fits,
    }
    const oneLine =
      node.tagName !== 'TEXTAREA' && /^(left|start|-webkit-auto)$/.test(style.textAlign)
    if (seen(node) && oneLine) addRun(node, run)
    return { value, fits: fits && oneLine }
  }

  // --- elements
  const roleOf = node => {
    const role = node.getAttribute('role')
    const name = node.tagName
    if (name === 'INPUT') {
      if (role === 'switch') return 'switch'
      if (node.closest('.custom-switch, .form-switch')) return 'switch'
      const kinds = {
        checkbox: 'checkbox',
        radio: 'radio',
        button: 'button',
        submit: 'button',
        reset: 'button',
      }
      if (kinds[node.type]) return kinds[node.type]
      return /^(text|email|search|password|tel|url|number|date|time)$/.test(node.type)
        ? 'field'
        : 'other'
    }
    if (name === 'SELECT') return node.multiple || node.size > 1 ? 'other' : 'select'
    if (name === 'TEXTAREA') return 'field'
    if (/^(tab|menuitem|switch|checkbox|button|link|option)$/.test(role ?? '')) return role
    if (name === 'BUTTON') return 'button'
    if (node.closest('[role=tablist], .nav-tabs')) return 'tab'
    if (/\b(btn|button)\b/.test(node.className)) return 'button'
    if (node.closest('.pagination')) return 'page'
    return node.closest('nav, aside, .sidebar, .navbar, .nav, .menu') ? 'menuitem' : 'link'
  }
  const iconOf = node => {
    const drawings = [...node.querySelectorAll('svg, i, span[class*=fa-]')].filter(seen)
    const names = drawings.map(drawing => {
      if (drawing.dataset.icon) return drawing.dataset.icon
      const marks = drawing.getAttribute('class') ?? ''
      return (
        /(?:^|\s)(?:fa|fe|bi|lucide|icon|ti|glyphicon)-([a-z0-9-]+)(?!.*\s(?:fa|fe|bi)-[a-z])/.exec(
          marks,
        )?.[1] ?? '?'
      )
    })
    return names.filter(name => !/^(form-icon)$/.test(name))
  }
  const labelOf = node => {
    const label = node.labels?.[0]
    if (label) return label
    const group = node.closest('.form-group, .field, .mb-3')
    const labels = group ? [...group.querySelectorAll('label')] : []
    const inputs = group ? [...group.querySelectorAll('input, select, textarea')] : []
    return labels.length === 1 && inputs.length === 1 ? labels[0] : null
  }
  const joined = (a, b) => [
    Math.min(a[0], b[0]),
    Math.min(a[1], b[1]),
    Math.max(a[2], b[2]),
    Math.max(a[3], b[3]),
  ]
  const textBox = node => {
    range.selectNodeContents(node)
    return boxOf(range.getBoundingClientRect())
  }
  const faced = node => {
    const style = getComputedStyle(node)
    const clear =
      /^(transparent|rgba\(.*, 0\))$/.test(style.backgroundColor) &&
      style.backgroundImage === 'none'
    const edges = ['Top', 'Right', 'Bottom', 'Left'].filter(
      side =>
        parseFloat(style[`border${side}Width`]) > 0 &&
        !/^(transparent|rgba\(.*, 0\))$/.test(style[`border${side}Color`]) &&
        style[`border${side}Style`] !== 'none',
    )
    return !clear || edges.length === 4 || style.boxShadow !== 'none'
  }
  const drawn = node => {
    const parts = runs.filter(run => node.contains(run.node)).map(run => run.box)
    const drawings = [...node.querySelectorAll('svg, i, img')]
      .filter(seen)
      .map(at => boxOf(at.getBoundingClientRect()))
    return parts.length ? [...parts, ...drawings.filter(b => b[2] - b[0] > 2)].reduce(joined) : null
  }
  const elements = []
  const indexOf = new Map()
  const selector =
    'button, a[href], input, select, textarea, [role=tab], [role=menuitem], [role=switch], [role=button]'
  for (const node of document.querySelectorAll(selector)) {
    if (
      node.type === 'hidden' ||
      node.parentElement.closest('button, [role=tab], [role=menuitem], a[href]')
    )
      continue
    const role = roleOf(node)
    const ticks = /^(checkbox|radio|switch)$/.test(role)
    const label = labelOf(node)
    if (!(seen(node) || (ticks && label && seen(label)))) continue
    const rects = [...node.getClientRects()].filter(r => r.width > 1 && r.height > 1)
    let box = boxOf(node.getBoundingClientRect())
    if (ticks && label) {
      const text = textBox(label)
      const near =
        box[2] - box[0] > 4 &&
        box[2] > text[0] - 30 &&
        box[0] < text[2] + 30 &&
        box[3] > text[1] - 12 &&
        box[1] < text[3] + 12
      box = near && (seen(node) || box[2] - box[0] < 60) ? joined(box, text) : text
      // Where the framework hides the box and draws another, it does so before the label.
      const before = getComputedStyle(label, '::before')
      const whole = boxOf(label.getBoundingClientRect())
      if (!seen(node) && before.content !== 'none')
        box = joined(box, [
          whole[0] + Math.min(0, parseFloat(before.left) || 0),
          whole[1],
          text[2],
          whole[3],
        ])
      if (box[2] - box[0] > 260) continue
    }
    // A link without a face of its own is as large as what it shows.
    if (/^(link|menuitem|tab|page)$/.test(role) && !faced(node)) box = drawn(node) ?? box
    if (away(box) || box[2] - box[0] < 5 || box[3] - box[1] < 5) continue
    const own = top =>
      top &&
      (node.contains(top) ||
        label?.contains(top) ||
        (ticks && top.contains(node) && top.contains(label) && top.children.length < 6))
    const points = [
      [0.5, 0.5],
      [0.2, 0.3],
      [0.8, 0.3],
      [0.2, 0.7],
      [0.8, 0.7],
    ]
    const hits = points.map(([u, v]) =>
      own(hit(box[0] + u * (box[2] - box[0]), box[1] + v * (box[3] - box[1]))),
    )
    const covered =
      (!hits[0] && !(ticks && hits.some(Boolean))) || hits.filter(Boolean).length < (ticks ? 2 : 4)
    const isField = role === 'field' || role === 'select'
    const inside = isField
      ? fieldText(node)
      : { value: node.tagName === 'INPUT' && role === 'button' ? node.value : '', fits: true }
    const host = node.closest('li') ?? node
    const around = [node, node.parentElement === host ? host : node]
    const active = around.some(
      at =>
        at.getAttribute('aria-selected') === 'true' ||
        (at.hasAttribute('aria-current') && at.getAttribute('aria-current') !== 'false') ||
        /(^|\s)(active|uk-active|is-active|current)(\s|$)/.test(at.className),
    )
    const parts = [[node], [node, '::before'], [node, '::after'], [host]]
    const looks = parts
      .map(([at, pseudo]) => {
        const style = getComputedStyle(at, pseudo)
        const names = [
          'color',
          'backgroundColor',
          'backgroundImage',
          'fontWeight',
          'boxShadow',
          'textDecorationLine',
        ]
        const edges = ['Top', 'Right', 'Bottom', 'Left'].map(
          side => style[`border${side}Width`] + style[`border${side}Color`],
        )
        return [...names.map(name => style[name]), ...edges].join()
      })
      .join(';')
    indexOf.set(node, elements.length)
    elements.push({
      role,
      box,
      covered,
      cut: outside(box),
      pieces: rects.length,
      icons: iconOf(node),
      label: label && seen(label) ? plain(label.innerText) : '',
      value: inside.value,
      fits: inside.fits,
      checked: ticks ? Boolean(node.checked) : null,
      active,
      disabled: Boolean(node.disabled),
      placeholder: Boolean(!inside.value && node.placeholder),
      node,
      labelNode: label,
      looks,
    })
  }

  // --- whom a run belongs to, and the visible text of elements
  const ownerOf = node => {
    for (const [el, at] of indexOf) {
      const label = elements[at].labelNode
      const ticks = elements[at].checked !== null
      if (el.contains(node) || (ticks && label?.contains(node))) return at
    }
    return -1
  }
  for (const run of runs) run.owner = ownerOf(run.node)
  elements.forEach((element, at) => {
    const mine = runs.filter(run => run.owner === at)
    element.text = plain(mine.map(run => run.text).join(' '))
    element.clear = mine.every(run => !run.covered && !run.cut)
  })

  // --- structures: tables, lists of rows, groups, names with values
  const inBox = box => !outside(box)
  const members = node => [...indexOf].filter(([el]) => node.contains(el)).map(([, at]) => at)
  const textOf = node => plain(node.innerText)
  const tables = [...document.querySelectorAll('table')]
    .filter(seen)
    .map(table => {
      const box = boxOf(table.getBoundingClientRect())
      const lines = [...table.querySelectorAll('tbody tr')].filter(seen)
      const heads = [...table.querySelectorAll('thead th, thead td')].map(cell => ({
        text: textOf(cell),
        box: boxOf(cell.getBoundingClientRect()),
      }))
      const rows = lines.map(row => ({
        box: boxOf(row.getBoundingClientRect()),
        elements: members(row),
        cells: [...row.cells].map(cell => ({
          text: textOf(cell),
          box: textBox(cell),
          whole: inBox(textBox(cell)),
        })),
      }))
      return { box, heads, rows, whole: inBox(box) }
    })
    .filter(table => !away(table.box))
  const owners = [...document.querySelectorAll('tbody tr, [role=listitem], .cardbox')].filter(seen)
  const containers = owners
    .map(node => {
      const first = runs.find(run => node.contains(run.node))
      return {
        key: first
          ? plain(
              runs
                .filter(run => run.part === first.part)
                .map(run => run.text)
                .join(' '),
            )
          : '',
        clear: Boolean(first && !first.covered && !first.cut),
        box: boxOf(node.getBoundingClientRect()),
        kind: node.tagName === 'TR' ? 'row' : 'card',
        elements: members(node),
      }
    })
    .filter(container => !away(container.box))
  const groups = [
    ...document.querySelectorAll(
      '[role=tablist], .nav-tabs, nav, [role=menu], [role=radiogroup], .pagination',
    ),
  ]
    .filter(seen)
    .map(node => {
      const kind = node.matches('[role=tablist], .nav-tabs')
        ? 'tabs'
        : node.matches('[role=menu]')
          ? 'menu'
          : node.matches('[role=radiogroup]')
            ? 'radios'
            : node.matches('.pagination')
              ? 'pages'
              : 'nav'
      // An active item must look like no other.
      const parts = members(node)
      for (const at of parts) {
        const alike = parts.some(
          other => other !== at && elements[other].looks === elements[at].looks,
        )
        if (elements[at].active && alike) elements[at].active = false
      }
      return {
        kind,
        label: node.getAttribute('aria-label') ?? '',
        box: boxOf(node.getBoundingClientRect()),
        elements: parts,
        whole: inBox(boxOf(node.getBoundingClientRect())),
      }
    })
    .filter(group => !away(group.box) && group.elements.length)
  const pairs = [...document.querySelectorAll('[data-pair], .info-box-content')]
    .filter(seen)
    .map(node => {
      const name = node.dataset.pair || node.querySelector('small, .info-box-text')?.innerText || ''
      const value = node.querySelector('b, .info-box-number')
      return value
        ? {
            name: plain(name),
            value: textOf(value),
            box: textBox(value),
            whole: inBox(textBox(value)),
          }
        : null
    })
    .filter(Boolean)
  const dialogs = [...document.querySelectorAll('[role=dialog]')]
    .filter(seen)
    .map(node => boxOf(node.getBoundingClientRect()))
  return {
    elements: elements.map(({ node, labelNode, looks, ...kept }) => kept),
    runs: runs.map(({ node, ...kept }) => kept),
    tables,
    containers,
    groups,
    pairs,
    dialogs,
    size: [view.width, view.height],
  }
}
