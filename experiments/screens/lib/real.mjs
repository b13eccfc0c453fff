// Pages that people published as demonstrations of their themes; nothing of them is in a training page.
import { existsSync, readdirSync } from 'node:fs'
import { join, relative } from 'node:path'
import { UserError } from './browser.mjs'
import { SIDE } from './pages.mjs'
import { Stream } from './stream.mjs'

// Package, folders of its pages, and picture pixels per CSS pixel.
export const THEMES = {
  'admin-lte': { folders: ['', 'pages'], scale: 0.75 },
  'tabler-ui': { folders: ['dist'], scale: 0.8 },
  'startbootstrap-sb-admin-2': { folders: [''], scale: 0.75 },
  gentelella: { folders: ['dist/production'], scale: 0.85 },
}
// Where these themes look for what a package manager would have put beside them.
export const MOVED = [['admin-lte/plugins/fontawesome-free', '@fortawesome/fontawesome-free']]
export const ROOT = 'gentelella/dist' // its pages name files from the root of the server

const DEPTH = 2
const WINDOW = [1024, 1600] // CSS pixels

const pagesIn = (folder, depth) =>
  readdirSync(folder, { withFileTypes: true }).flatMap(entry => {
    const path = join(folder, entry.name)
    if (
      entry.isDirectory() &&
      depth &&
      !/^(node_modules|docs|layout|assets|demo|vendor|plugins|js|css|build|dist)$/.test(entry.name)
    ) {
      return pagesIn(path, depth - 1)
    }
    return /(?<!^rtl|^icons|-print)\.html$/.test(entry.name) ? [path] : []
  })

// All pages of all themes in an order drawn from the seed: {theme, path, scale}.
export function publishedPages(modules, seed) {
  const all = Object.entries(THEMES).map(([theme, { folders, scale }]) => {
    if (!existsSync(join(modules, theme))) {
      throw new UserError(
        `the package ${theme} is missing in ${modules}: run npm install in experiments/screens.`,
      )
    }
    const files = [
      ...new Set(
        folders.flatMap(folder => pagesIn(join(modules, theme, folder), folder === '' ? 0 : DEPTH)),
      ),
    ]
    const unlike = new Stream('real', theme, seed).shuffled(files.sort())
    return unlike.map(file => ({ theme, path: relative(modules, file), scale }))
  })
  // In turn, so that a small theme is not lost among large ones.
  const most = Math.max(...all.map(list => list.length))
  return Array.from({ length: most }, (_, i) => all.map(list => list[i]).filter(Boolean)).flat()
}

// Parts of a window that can be pictures, drawn from the key; CSS pixels.
export function crops(scale, height, ...key) {
  const side = Math.round(SIDE / scale)
  const stream = new Stream('crops', ...key)
  const lines = Math.floor(Math.min(height, WINDOW[1]) / side)
  const places = Array.from({ length: 3 * lines }, (_, i) => ({
    x: ((i % 3) * (WINDOW[0] - side)) >> 1,
    y: Math.floor(i / 3) * side,
  }))
  return stream.shuffled(places).map(({ x, y }) => ({
    x: Math.max(0, Math.min(WINDOW[0] - side, x + stream.integer(-20, 20))),
    y: Math.max(0, Math.min(WINDOW[1] - side, y + stream.integer(-20, 20))),
    width: side,
    height: side,
  }))
}

export const window = WINDOW
