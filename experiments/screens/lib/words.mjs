// Every text on a training page comes from these lists, so that a small model can learn to read them.
import { en, Faker } from '@faker-js/faker'
import { Stream } from './stream.mjs'

const list = text => text.trim().split(/\s*,\s*/)

export const ACTIONS =
  list(`Save, Cancel, Delete, Edit, Send, Reply, Copy, Share, Print, Export, Import, Upload,
  Download, Search, Filter, Refresh, Apply, Reset, Submit, Continue, Back, Next, Close, Open, Add, Remove, Update, Undo,
  Redo, Login, Sign up, Log out, Buy now, Pay, Order, Follow, Book, Confirm, Accept, Reject, Approve, Archive, Restore,
  Publish, Preview, Rename, Move, Duplicate, Install, Connect, Start, Stop, Pause, Resume, Play, Record, Scan, Sync,
  Learn more, Read more, View all, Show more, New file, New user, Add item, Add row, Get help, Try again, Skip, Done,
  Create, Invite, Join, Leave, Merge, Test, Run, Build, Deploy, Verify, Unlock, Lock, Track, Compare, Subscribe, Donate`)

export const PLACES =
  list(`Home, Dashboard, Reports, Settings, Profile, Messages, Inbox, Orders, Products, Customers,
  Invoices, Calendar, Tasks, Projects, Files, Photos, Videos, Music, Users, Teams, Billing, Security, Privacy, Help,
  About, Contact, Blog, News, Events, Store, Cart, Wishlist, Account, Payments, Analytics, Traffic, Sales, Support,
  History, Activity, Drafts, Sent, Spam, Trash, Starred, Important, General, Display, Sound, Network, Storage, Battery,
  Language, Keyboard, Printers, Devices, Updates, Backup, Notes, Contacts, Groups, Forum, Wiki, Docs, Guides, Pricing,
  Careers, Partners, Features, Overview, Summary, Details, Reviews, Comments, Members, Roles, Logs, Alerts, Metrics,
  Servers, Database, Domains, Plugins, Themes, Layout, Pages, Media, Library, Archive, Schedule, Rooms, Flights, Hotels`)

export const FIELDS =
  list(`First name, Last name, Email, Phone, City, Country, Street, Zip code, Company, Website,
  Title, Subject, Username, Nickname, Birthday, Department, Position, Quantity, Price, Discount, Amount, Weight, Height,
  Width, Size, Color, Brand, Model, Number, Code, Label, Tag, Category, Location, Building, Room, Floor, Manager, Owner,
  Team, Project, Budget, Rate, Tax, Total, Currency, Bank, Branch, School, Course, Grade, Doctor, Hospital, Airport,
  Hotel, Guests, Nights, Seats, Vehicle, Plate, Pet name, Host, Port, Path, Version, Region, District, Reference`)

export const CHECKS =
  list(`Newsletter, Remember me, Accept terms, Send copy, Gift wrap, Express delivery, Notifications,
  Auto save, Dark mode, Sound effects, Public profile, Show email, Allow comments, Sync contacts, Auto update, Location,
  Bluetooth, Airplane mode, Night light, Spell check, Word wrap, Line numbers, Full screen, Show grid, Show hidden,
  Two factor, Read receipts, Mobile data, Data saver, Vibration, Captions, Autoplay, Cookies, Pop ups, Tracking, Backups,
  Weekly report, Daily digest, Beta features, Animations, High contrast, Large text, Sticky keys, Screen lock, Guest mode,
  Wifi, Hotspot, Reminders, Breakfast, Parking, Insurance, Late checkout, Vegan, Extra cheese, Onions, Ice, Sugar, Milk`)

export const STATUSES = list(
  'Paid, Open, Closed, Pending, Shipped, Failed, Active, Draft, New, Late',
)
export const LEVELS = list('Low, Medium, High, Urgent')
export const SIZES = list('Small, Medium, Large, Extra')
export const MONTHS =
  list(`January, February, March, April, May, June, July, August, September, October, November,
  December`)
export const COLUMNS = {
  city: 'City',
  status: 'Status',
  count: 'Items',
  price: 'Price',
  month: 'Month',
  team: 'Team',
}
export const STATS =
  list(`Visitors, Revenue, Signups, Downloads, Errors, Likes, Sessions, Clicks, Tickets, Refunds,
  Shares, Stock, Views, Profit, Leads, Bugs, Steps, Calories, Miles, Points, Credits, Fans, Bookings, Deals`)
export const HEADINGS =
  list(`Welcome, My account, Your order, New message, Edit profile, Team list, Open tickets,
  Recent files, Best sellers, Today, This week, Checkout, Delivery, Preferences, Sign in, Create account, Contact us,
  System status, Control panel, Quick start, Latest news, Upcoming trips, Shopping cart, Workspace, Admin area`)
export const BRANDS =
  list(`Acme, Nova, Orbit, Pixel, Delta, Quartz, Lumen, Atlas, Vertex, Cobalt, Zephyr, Maple, Raven,
  Tempo, Aspen, Onyx, Fable, Juno`)
export const QUESTIONS = list(
  'Delete this file?, Leave this page?, Save changes?, Log out now?, Install update?',
)

// Words of faker (a pinned version) that are short and plain; sorted, so that only the list itself decides.
const plain = (items, most, name) => {
  const fit = [...new Set(items)].filter(word => /^[A-Z][a-z]{2,8}$/.test(word)).sort()
  return new Stream('words', name).some(fit, most).sort()
}
const capital = word => word[0].toUpperCase() + word.slice(1)
const stored = new Faker({ locale: en }).rawDefinitions
const every = value => (Array.isArray(value) ? value : Object.values(value ?? {}).flatMap(every))
export const NAMES = plain(every(stored.person.first_name), 120, 'names')
export const SURNAMES = plain(every(stored.person.last_name), 80, 'surnames')
export const CITIES = plain(every(stored.location.city_name), 80, 'cities')
export const PRODUCTS = plain(every(stored.commerce.product_name.product), 24, 'products')
export const DEPARTMENTS = plain(every(stored.commerce.department), 20, 'departments')
export const ANIMALS = plain(every(stored.animal.type).map(capital), 40, 'animals')
export const COLORS = plain(every(stored.color.human).map(capital), 24, 'colors')

// An icon's name, its file in bootstrap-icons, and its file in lucide.
export const ICONS = Object.fromEntries(
  list(`trash trash trash-2, pencil pencil pencil, star star star, heart heart heart,
  bell bell bell, search search search, gear gear settings, house house house, person person user, lock lock lock,
  envelope envelope mail, phone telephone phone, camera camera camera, calendar calendar calendar, clock clock clock,
  download download download, upload upload upload, printer printer printer, cart cart shopping-cart, gift gift gift,
  flag flag flag, key key key, bookmark bookmark bookmark, cloud cloud cloud, sun sun sun, moon moon moon,
  microphone mic mic, headphones headphones headphones, image image image, folder folder folder, link link-45deg link,
  paperclip paperclip paperclip, play play play, pause pause pause, plus plus-lg plus, cross x-lg x, check check-lg check,
  eye eye eye, filter funnel funnel, globe globe globe, map map map, pin pin pin, shield shield shield, bug bug bug,
  battery battery-half battery-medium, wifi wifi wifi, truck truck truck, umbrella umbrella umbrella, wallet wallet2 wallet,
  trophy trophy trophy, lightbulb lightbulb lightbulb, refresh arrow-clockwise rotate-cw, undo arrow-counterclockwise undo-2,
  share share share-2, menu list menu, grid grid grid-2x2, tag tag tag, building building building, book book book-open,
  hammer hammer hammer, scissors scissors scissors`).map(line => {
    const [name, bootstrap, lucide] = line.split(' ')
    return [name, { bootstrap, lucide }]
  }),
)
