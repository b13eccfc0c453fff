// A web server on this machine alone: stylesheets and fonts from node_modules, and the pages being rendered.
import { createServer } from 'node:http'
import { readFile } from 'node:fs/promises'
import { extname, join, normalize } from 'node:path'

const TYPES = {
  '.css': 'text/css',
  '.js': 'text/javascript',
  '.mjs': 'text/javascript',
  '.html': 'text/html',
  '.svg': 'image/svg+xml',
  '.png': 'image/png',
  '.jpg': 'image/jpeg',
  '.jpeg': 'image/jpeg',
  '.gif': 'image/gif',
  '.webp': 'image/webp',
  '.woff': 'font/woff',
  '.woff2': 'font/woff2',
  '.ttf': 'font/ttf',
  '.json': 'application/json',
}

// Answers /modules/<file> from the folder `modules` (by way of `moved`, pairs of a prefix and what replaces it) and
// /page/<key> from the map `pages`; anything else from the folder `root` of `modules`. Gives {address, close}.
export async function serve(modules, pages, moved = [], root = '') {
  const server = createServer(async (request, response) => {
    const path = decodeURIComponent(new URL(request.url, 'http://local').pathname)
    if (path.startsWith('/page/')) {
      const html = pages.get(path.slice(6))
      response.writeHead(html ? 200 : 404, { 'content-type': 'text/html; charset=utf-8' })
      return response.end(html ?? '')
    }
    let file = normalize(path.startsWith('/modules/') ? path.slice(9) : join(root, path))
    for (const [prefix, other] of moved)
      if (file.startsWith(prefix)) file = other + file.slice(prefix.length)
    try {
      if (file.startsWith('..')) throw new Error('not here')
      const body = await readFile(join(modules, file))
      const type = TYPES[extname(file).toLowerCase()] ?? 'application/octet-stream'
      response.writeHead(200, {
        'content-type': type,
        'cache-control': 'public, max-age=86400, immutable',
      })
      response.end(body)
    } catch {
      response.writeHead(404)
      response.end()
    }
  })
  await new Promise(done => server.listen(0, '127.0.0.1', done))
  const close = () => {
    server.closeAllConnections()
    server.close()
  }
  return { address: `http://127.0.0.1:${server.address().port}`, close }
}
