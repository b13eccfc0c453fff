// The frameworks of the training pages: their stylesheets, and the classes of their own documentation.
// `text` is the size of body text in CSS pixels; `on` says whether the item or its link carries the active class.
import { MORE } from './frameworks_more.mjs'

const bootstrap = {
  text: 16,
  css: ['bootstrap/dist/css/bootstrap.min.css'],
  dark: { 'data-bs-theme': 'dark' },
  button: 'btn btn-sm btn-secondary',
  primary: 'btn btn-sm btn-primary',
  quiet: 'btn btn-sm btn-outline-secondary',
  input: 'form-control form-control-sm',
  select: 'form-select form-select-sm',
  label: 'form-label mb-0',
  check: { wrap: 'form-check mb-0', input: 'form-check-input', label: 'form-check-label' },
  switch: {
    wrap: 'form-check form-switch mb-0',
    input: 'form-check-input',
    label: 'form-check-label',
  },
  tabs: {
    list: 'nav nav-tabs',
    item: 'nav-item',
    link: 'nav-link py-1 px-2',
    active: 'active',
    on: 'link',
  },
  nav: {
    list: 'nav nav-pills flex-column',
    item: 'nav-item',
    link: 'nav-link py-1 px-2',
    active: 'active',
    on: 'link',
  },
  pages: {
    list: 'pagination pagination-sm mb-0',
    item: 'page-item',
    link: 'page-link',
    active: 'active',
    on: 'item',
  },
  table: 'table table-sm mb-0',
  striped: 'table-striped',
  bordered: 'table-bordered',
  card: { box: 'card', body: 'card-body p-2', title: 'card-title h6 mb-1' },
  dialog: {
    box: 'card shadow',
    head: 'card-header py-1 px-2',
    title: 'h6 m-0',
    body: 'card-body p-2',
    foot: 'card-footer p-1',
  },
  badge: 'badge text-bg-secondary',
  alert: 'alert alert-info py-1 px-2 mb-0',
  bar: 'navbar bg-body-tertiary p-1',
  menu: { list: 'list-group', item: 'list-group-item list-group-item-action py-1 px-2' },
}

export const FRAMEWORKS = {
  bootstrap,
  coreui: {
    ...bootstrap,
    css: ['@coreui/coreui/dist/css/coreui.min.css'],
    dark: { 'data-coreui-theme': 'dark' },
    primary: 'btn btn-sm btn-success',
    quiet: 'btn btn-sm btn-outline-primary',
    badge: 'badge bg-info',
    nav: { ...bootstrap.nav, list: 'nav nav-underline flex-column' },
    tabs: { ...bootstrap.tabs, list: 'nav nav-underline-border' },
  },
  bulma: {
    text: 16,
    css: ['bulma/css/bulma.min.css'],
    dark: { 'data-theme': 'dark' },
    light: { 'data-theme': 'light' },
    button: 'button is-small',
    primary: 'button is-small is-link',
    quiet: 'button is-small is-light',
    input: 'input is-small',
    select: '',
    selectWrap: 'select is-small',
    label: 'label is-small mb-0',
    tabs: {
      list: 'tabs is-boxed is-small mb-0',
      inner: true,
      item: '',
      link: 'p-2',
      active: 'is-active',
      on: 'item',
    },
    nav: { list: 'menu-list', item: '', link: 'py-1 px-2', active: 'is-active', on: 'link' },
    pages: {
      outer: 'pagination is-small',
      list: 'pagination-list',
      item: '',
      link: 'pagination-link',
      active: 'is-current',
      on: 'link',
    },
    table: 'table is-narrow is-fullwidth mb-0',
    striped: 'is-striped',
    bordered: 'is-bordered',
    card: { box: 'card', body: 'card-content p-2', title: 'title is-6 mb-1' },
    dialog: {
      box: 'box p-0',
      head: 'modal-card-head py-1 px-2',
      title: 'modal-card-title is-size-6',
      body: 'p-2',
      foot: 'p-2 is-flex',
    },
    badge: 'tag is-info',
    alert: 'notification is-info is-light p-2 mb-0',
    bar: 'navbar has-background-light p-1',
    barDark: 'navbar p-1',
    menu: { list: 'box p-1 mb-0', item: 'dropdown-item py-1 px-2' },
  },
  pico: {
    text: 16,
    css: ['@picocss/pico/css/pico.min.css'],
    dark: { 'data-theme': 'dark' },
    light: { 'data-theme': 'light' },
    button: 'secondary',
    primary: '',
    quiet: 'outline',
    input: '',
    select: '',
    label: '',
    switchRole: true,
    check: {},
    switch: {},
    table: '',
    striped: 'striped',
    bordered: '',
    tabs: { list: '', item: '', link: '', active: '', on: 'link' },
    nav: { list: '', item: '', link: '', active: '', on: 'link' },
    pages: { list: '', item: '', link: '', active: '', on: 'link' },
    card: { box: '', tag: 'article', body: '', title: '' },
    dialog: { tag: 'article', box: '', head: '', title: '', body: '', foot: '' },
    badge: '',
    badgeTag: 'mark',
    alert: '',
    bar: '',
    menu: { list: '', item: '' },
    extra: `.dialog{padding:6px!important} :root{--pico-spacing:.5rem!important;--pico-form-element-spacing-vertical:.2rem!important;
      --pico-form-element-spacing-horizontal:.4rem!important;--pico-font-size:100%!important;
      --pico-typography-spacing-vertical:.3rem!important}
      button{padding:.2rem .5rem!important;margin:0!important;width:auto!important}
      input[type=text],select{margin:0!important;height:auto!important} input{margin-top:0!important;margin-bottom:0!important}
      select{padding-right:1.6rem!important} article{margin:0!important} nav,nav .s-col,.s-col li{display:block!important}
      ul.s-row,.s-col,.s-col li,.s-row li{list-style:none;padding:0;margin:0} [aria-selected=true],[aria-current]{
      background:var(--pico-primary-background);color:var(--pico-primary-inverse);text-decoration:none}
      .s-row li a,.s-col li a{padding:.15rem .4rem;margin:0;display:block}`,
  },
  uikit: {
    text: 16,
    css: ['uikit/dist/css/uikit.min.css'],
    button: 'uk-button uk-button-default uk-button-small',
    primary: 'uk-button uk-button-primary uk-button-small',
    quiet: 'uk-button uk-button-text',
    input: 'uk-input uk-form-small',
    select: 'uk-select uk-form-small',
    label: 'uk-form-label',
    check: { wrap: '', input: 'uk-checkbox', radio: 'uk-radio', label: '' },
    tabs: { list: 'uk-tab', item: '', link: '', active: 'uk-active', on: 'item' },
    nav: { list: 'uk-nav uk-nav-default', item: '', link: '', active: 'uk-active', on: 'item' },
    pages: { list: 'uk-pagination', item: '', link: '', active: 'uk-active', on: 'item' },
    table: 'uk-table uk-table-small uk-table-divider',
    striped: 'uk-table-striped',
    bordered: '',
    card: { box: 'uk-card uk-card-default', body: 'uk-padding-small', title: 'uk-card-title' },
    dialog: {
      box: 'uk-modal-dialog',
      head: 'uk-modal-header',
      title: 'uk-modal-title',
      body: 'uk-padding-small',
      foot: 'uk-modal-footer',
    },
    badge: 'uk-label',
    alert: 'uk-alert uk-alert-primary',
    bar: 'uk-background-muted',
    menu: { list: 'uk-nav uk-dropdown-nav uk-card uk-card-default', item: '' },
    extra: `.uk-padding-small{padding:6px!important} .uk-tab{margin:0 0 4px!important;padding:0}
      .uk-tab>*{padding-left:0}.uk-tab>*>a{padding:3px 8px} .uk-table{margin:0!important}
      .uk-table th,.uk-table td{padding:4px 6px!important}.uk-modal-header,.uk-modal-footer{padding:6px 8px!important}
      .uk-button{padding:0 9px;text-transform:none} .uk-alert{margin:0!important;padding:5px}
      .uk-pagination{margin:0;flex-wrap:nowrap} .uk-nav-default>li>a{padding:3px 8px}
      .uk-nav-default .uk-active>a{background:#dde6f3;color:#123}.uk-label{text-transform:none;font-size:.8em}
      .uk-table th{text-transform:none}`,
  },
  foundation: {
    text: 16,
    css: ['foundation-sites/dist/css/foundation.min.css'],
    button: 'button small secondary',
    primary: 'button small',
    quiet: 'button small hollow',
    input: '',
    select: '',
    label: '',
    tabs: { list: 'tabs', item: 'tabs-title', link: '', active: 'is-active', on: 'item' },
    nav: { list: 'menu vertical', item: '', link: '', active: 'is-active', on: 'item' },
    pages: { list: 'pagination', item: '', link: '', active: 'current', on: 'item' },
    table: 'hover',
    striped: '',
    bordered: '',
    card: { box: 'card', body: 'card-section', title: '' },
    dialog: { box: 'callout', head: '', title: '', body: '', foot: '' },
    badge: 'label secondary',
    alert: 'callout primary small',
    bar: 'top-bar',
    menu: { list: 'card', item: '' },
    extra: `.button{margin:0!important;padding:.35em .6em!important} input{margin:0!important} input[type=text],select{margin:0!important;
      height:1.9em!important;padding:.1em .4em!important} select{padding-right:1.5em!important}
      .card,.callout,table{margin:0!important} .card-section,.callout{padding:.4em!important} label{line-height:1.4}
      .tabs-title>a{padding:.5em .7em;font-size:.9em} .tabs-title>a[aria-selected=true]{background:#cfe3f3}
      th,td{padding:.25em .4em!important} .top-bar{padding:.2em} .menu a{padding:.3em .5em}
      .menu .is-active>a{background:#1779ba;color:#fff} .pagination{margin:0;display:flex} .pagination li{display:inline-block!important} .pagination .current{background:#1779ba} .pagination .current a{color:#fff}
      .tick label{display:inline}`,
  },
  semantic: {
    text: 14,
    css: ['semantic-ui-css/semantic.min.css'],
    button: 'ui mini button',
    primary: 'ui mini primary button',
    quiet: 'ui mini basic button',
    input: '',
    inputWrap: 'ui mini input',
    select: 'ui mini',
    label: '',
    check: { wrap: 'ui checkbox', radioWrap: 'ui radio checkbox', input: '', label: '' },
    switch: { wrap: 'ui toggle checkbox', input: '', label: '' },
    tabs: {
      tag: 'div',
      list: 'ui tabular mini menu',
      item: null,
      link: 'item',
      active: 'active',
      on: 'link',
    },
    nav: {
      tag: 'div',
      list: 'ui vertical fluid mini menu',
      item: null,
      link: 'item',
      active: 'active',
      on: 'link',
    },
    pages: {
      tag: 'div',
      list: 'ui mini pagination menu',
      item: null,
      link: 'item',
      active: 'active',
      on: 'link',
    },
    table: 'ui very compact unstackable table',
    striped: 'striped',
    bordered: 'celled',
    card: { box: 'ui segment', body: '', title: 'ui small header' },
    dialog: {
      box: 'ui segments',
      head: 'ui secondary segment',
      title: 'ui small header',
      body: 'ui segment',
      foot: 'ui segment',
    },
    badge: 'ui mini label',
    alert: 'ui info tiny message',
    bar: 'ui secondary segment',
    menu: { list: 'ui vertical mini menu', item: 'item' },
    extra: `.ui.segment,.ui.menu,.ui.message,.ui.table{margin:0!important;padding:.5em}.ui.menu,.ui.table{padding:0}
      .ui.input>input{width:100%;padding:.35em .5em!important}.ui.table td,.ui.table th{padding:.3em .4em!important}
      .ui.button{margin:0!important} .ui.header{margin:0 0 3px!important} select{padding:.3em;border:1px solid #ccc;
      border-radius:4px;background:#fff} .ui.menu .item{padding:.6em .7em!important} .ui.mini.menu{font-size:.9em}`,
  },
  govuk: MORE.govuk,
  patternfly: MORE.patternfly,
  win98: { ...windows('98.css/dist/98.css', '#008080', 'silver'), text: 11 },
  winxp: { ...windows('xp.css/dist/XP.css', '#3a6ea5', '#ece9d8'), text: 11 },
  spectre: {
    text: 16,
    css: ['spectre.css/dist/spectre.min.css'],
    button: 'btn btn-sm',
    primary: 'btn btn-sm btn-primary',
    quiet: 'btn btn-sm btn-link',
    input: 'form-input input-sm',
    select: 'form-select select-sm',
    label: 'form-label label-sm',
    check: { nested: true, wrap: 'form-checkbox input-sm', radioWrap: 'form-radio input-sm' },
    switch: { nested: true, wrap: 'form-switch input-sm' },
    tabs: { list: 'tab', item: 'tab-item', link: '', active: 'active', on: 'item' },
    nav: { list: 'nav', item: 'nav-item', link: '', active: 'active', on: 'item' },
    pages: { list: 'pagination', item: 'page-item', link: '', active: 'active', on: 'item' },
    table: 'table',
    striped: 'table-striped',
    bordered: '',
    card: { box: 'card', body: 'card-body', title: 'card-title h6' },
    dialog: {
      box: 'modal-container',
      head: 'modal-header',
      title: 'modal-title h6',
      body: 'modal-body',
      foot: 'modal-footer',
    },
    badge: 'label label-secondary',
    alert: 'toast toast-primary',
    bar: 'navbar bg-secondary',
    menu: { list: 'menu', item: '' },
    extra: `.card-body,.modal-header,.modal-body,.modal-footer,.toast{padding:6px!important} .tab{margin:0 0 4px!important}
      .table th,.table td{padding:4px!important} .pagination,.nav{margin:0!important} .tab .tab-item{flex:0 0 auto!important}
      .tab-item>a{padding:4px 8px!important} .nav-item.active>a{background:#eef0fd} .navbar{padding:4px}
      .form-checkbox,.form-radio,.form-switch{margin:0!important} .menu{padding:4px!important;min-width:0}
      .menu a{display:block;padding:2px 6px;margin:0!important} .pagination .page-item{margin:0!important}`,
  },
  milligram: {
    text: 16,
    css: ['milligram/dist/milligram.min.css'],
    button: 'button',
    primary: 'button',
    quiet: 'button button-outline',
    input: '',
    select: '',
    label: '',
    check: { wrap: '', input: '', label: 'label-inline' },
    tabs: { list: '', item: '', link: '', active: 'now', on: 'link' },
    nav: { list: '', item: '', link: '', active: 'now', on: 'link' },
    pages: { list: '', item: '', link: '', active: 'now', on: 'link' },
    table: '',
    striped: '',
    bordered: '',
    card: { box: 'box', body: '', title: '' },
    dialog: { box: 'box', head: '', title: '', body: '', foot: '' },
    badge: 'tagged',
    alert: 'box',
    bar: 'bar',
    menu: { list: 'box', item: '' },
    extra: `.button{margin:0!important;height:auto!important;line-height:1.4!important;padding:.25em .6em!important;
      text-transform:none;letter-spacing:0;font-size:.85em} input{margin:0!important} input[type=text],select{height:2em!important;
      padding:.1em .5em!important} label,li,table{margin:0!important} ul{list-style:none;margin:0!important}
      .box{border:1px solid #ccc;border-radius:4px;padding:6px;background:#fff} th,td{padding:.25em .4em!important}
      .now{border-bottom:3px solid #9b4dca;font-weight:700} li a{padding:.15em .4em;display:block}
      .bar{background:#f4f5f6;padding:4px} .tagged{background:#606c76;color:#fff;border-radius:3px;padding:0 5px}
      .label-inline{margin-left:.4em!important}`,
  },
}

// The stylesheets that draw the windows of old.
function windows(css, desktop, face) {
  return {
    css: [css],
    button: '',
    primary: 'default',
    quiet: '',
    input: '',
    select: '',
    label: '',
    tabs: { tag: 'menu', list: '', item: '', itemRole: 'tab', link: '', active: '', on: 'item' },
    nav: { list: 'tree-view', item: '', link: '', active: 'now', on: 'link' },
    pages: { list: 'buttons', item: '', link: '', active: 'now', on: 'link' },
    table: '',
    striped: '',
    bordered: '',
    card: { box: 'window', body: 'window-body', title: 'title-bar-text' },
    dialog: {
      box: 'window',
      head: 'title-bar',
      title: 'title-bar-text',
      body: 'window-body',
      foot: 'window-body',
    },
    badge: '',
    badgeTag: 'u',
    alert: 'status-bar',
    bar: 'window',
    menu: { list: 'window', item: '' },
    extra: `button .ic{color:#222} .bar{padding:4px!important;margin:0} body{background:${desktop}} #page{background:${face};border:1px solid #fff} .window-body{margin:5px!important}
      table{background:#fff;width:100%;border-collapse:collapse} th,td{padding:2px 4px;text-align:left;
      border:1px solid #ccc} button{min-width:0!important;padding:0 7px!important} menu{margin:0 0 4px!important}
      .now{background:#000080;color:#fff} ul.s-row{list-style:none;padding:0;margin:0} .s-col>li>a{padding:2px 6px;display:block}
      .tree-view.s-col>li{padding:0!important;margin:0!important} .tree-view.s-col>li:before{content:none!important}
      a{color:#00c} .tree-view .now{color:#fff} h1,h2,h3{font-weight:bold} .window>.title-bar-text{color:#000;text-shadow:none}
      .s-row>li>a{padding:1px 4px}`,
  }
}

export const FONTS = {
  Roboto: 'roboto',
  Inter: 'inter',
  'Open Sans': 'open-sans',
  Lato: 'lato',
  'Noto Sans': 'noto-sans',
  'Source Sans 3': 'source-sans-3',
}
