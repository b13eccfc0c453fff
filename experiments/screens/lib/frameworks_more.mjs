// The frameworks with the most classes of their own.
export const MORE = {
  govuk: {
    text: 16,
    css: ['govuk-frontend/dist/govuk/govuk-frontend.min.css'],
    body: 'govuk-frontend-supported',
    button: 'govuk-button govuk-button--secondary',
    primary: 'govuk-button',
    quiet: 'govuk-button govuk-button--warning',
    input: 'govuk-input',
    select: 'govuk-select',
    label: 'govuk-label',
    check: {
      wrap: 'govuk-checkboxes__item',
      radioWrap: 'govuk-radios__item',
      group: 'govuk-checkboxes--small',
      radioGroup: 'govuk-radios--small',
      input: 'govuk-checkboxes__input',
      radio: 'govuk-radios__input',
      label: 'govuk-label govuk-checkboxes__label',
      radioLabel: 'govuk-label govuk-radios__label',
    },
    tabs: {
      list: 'govuk-tabs__list',
      item: 'govuk-tabs__list-item',
      link: 'govuk-tabs__tab',
      active: 'govuk-tabs__list-item--selected',
      on: 'item',
    },
    nav: { list: 'govuk-list', item: '', link: 'govuk-link', active: 'now', on: 'item' },
    pages: {
      list: 'govuk-pagination__list',
      item: 'govuk-pagination__item',
      link: 'govuk-link',
      active: 'govuk-pagination__item--current',
      on: 'item',
    },
    table: 'govuk-table',
    th: 'govuk-table__header',
    td: 'govuk-table__cell',
    striped: '',
    bordered: '',
    card: {
      box: 'govuk-summary-card',
      body: 'govuk-summary-card__content',
      title: 'govuk-heading-s',
    },
    dialog: {
      box: 'govuk-notification-banner',
      head: 'govuk-notification-banner__header',
      title: 'govuk-notification-banner__title',
      body: 'govuk-notification-banner__content',
      foot: 'pad',
    },
    badge: 'govuk-tag',
    alert: 'govuk-inset-text',
    bar: 'govuk-service-navigation',
    menu: { list: '', item: 'govuk-link' },
    extra: `.govuk-button{margin:0!important;padding:4px 8px 3px!important;width:auto!important}
      .govuk-table,.govuk-list,.govuk-summary-card,.govuk-inset-text,.govuk-notification-banner{margin:0!important}
      .govuk-table__header,.govuk-table__cell{padding:4px 6px 4px 0!important} .govuk-label{margin:0!important}
      .govuk-input,.govuk-select{height:28px!important;padding:2px 4px!important;max-width:100%;min-width:0!important}
      .govuk-summary-card__content,.govuk-inset-text,.govuk-notification-banner__content,.pad{padding:6px!important}
      .govuk-checkboxes__item,.govuk-radios__item{margin:0!important} .now{border-left:4px solid #1d70b8;padding-left:4px}
      .govuk-tabs__list{display:flex;margin:0 0 4px;border-bottom:1px solid #b1b4b6}.govuk-tabs__list-item{margin:0 3px 0 0!important;
      padding:4px 8px!important;background:#f3f2f1;list-style:none} .govuk-tabs__list-item:before{content:none!important}
      .govuk-tabs__list-item--selected{background:#fff!important;border:1px solid #b1b4b6;border-bottom:0}
      .govuk-pagination__item{padding:2px 6px;display:block!important;min-width:0} .govuk-pagination__item--current{
      background:#1d70b8;color:#fff} .govuk-pagination__item--current a{color:#fff!important} .govuk-tag{font-size:.9em;padding:1px 4px}`,
  },
  patternfly: {
    text: 14,
    css: ['@patternfly/patternfly/patternfly.min.css'],
    darkClass: 'pf-v6-theme-dark',
    button: 'pf-v6-c-button pf-m-secondary pf-m-small',
    primary: 'pf-v6-c-button pf-m-primary pf-m-small',
    quiet: 'pf-v6-c-button pf-m-tertiary pf-m-small',
    input: '',
    inputWrap: 'pf-v6-c-form-control',
    select: '',
    selectWrap: 'pf-v6-c-form-control',
    label: 'pf-v6-c-form__label',
    check: {
      wrap: 'pf-v6-c-check',
      radioWrap: 'pf-v6-c-radio',
      input: 'pf-v6-c-check__input',
      radio: 'pf-v6-c-radio__input',
      label: 'pf-v6-c-check__label',
      radioLabel: 'pf-v6-c-radio__label',
    },
    tabs: {
      list: 'pf-v6-c-tabs__list',
      item: 'pf-v6-c-tabs__item',
      link: 'pf-v6-c-tabs__link',
      active: 'pf-m-current',
      on: 'item',
      outer: 'pf-v6-c-tabs',
    },
    nav: {
      list: 'pf-v6-c-nav__list',
      item: 'pf-v6-c-nav__item',
      link: 'pf-v6-c-nav__link',
      active: 'pf-m-current',
      on: 'link',
      outer: 'pf-v6-c-nav',
    },
    pages: {
      list: '',
      item: '',
      link: 'pf-v6-c-button pf-m-plain pf-m-small',
      active: 'pf-m-clicked',
      on: 'link',
    },
    table: 'pf-v6-c-table pf-m-compact',
    thead: 'pf-v6-c-table__thead',
    tr: 'pf-v6-c-table__tr',
    th: 'pf-v6-c-table__th',
    td: 'pf-v6-c-table__td',
    striped: 'pf-m-striped',
    bordered: '',
    card: { box: 'pf-v6-c-card', body: 'pf-v6-c-card__body', title: 'pf-v6-c-card__title-text' },
    dialog: {
      box: 'pf-v6-c-modal-box',
      head: 'pf-v6-c-modal-box__header',
      title: 'pf-v6-c-modal-box__title',
      body: 'pf-v6-c-modal-box__body',
      foot: 'pf-v6-c-modal-box__footer',
    },
    badge: 'pf-v6-c-badge pf-m-unread',
    alert: 'pf-v6-c-alert pf-m-info pf-m-inline',
    bar: 'pf-v6-c-toolbar',
    menu: { list: 'pf-v6-c-menu', item: 'pf-v6-c-menu__item' },
    extra: `.pf-v6-c-card__body,.pf-v6-c-toolbar{padding:6px!important}.pf-v6-c-alert{padding:6px!important;display:block}
      .pf-v6-c-modal-box__header,.pf-v6-c-modal-box__body,.pf-v6-c-modal-box__footer{padding:6px 8px!important}
      .pf-v6-c-modal-box{position:static!important} .pf-v6-c-form-control{width:100%} .pf-v6-c-tabs__link{padding:5px 8px}
      .pf-v6-c-form-control>input,.pf-v6-c-form-control>select{padding:3px 6px!important;width:100%}
      .pf-v6-c-table__th,.pf-v6-c-table__td{padding:4px 6px!important} .pf-v6-c-nav__link{padding:4px 8px!important}
      .pf-v6-c-menu__item{padding:4px 8px!important;display:block;width:100%}.pf-v6-c-tabs__list{margin:0}
      .pf-v6-c-button{--pf-v6-c-button--PaddingInlineStart:8px;--pf-v6-c-button--PaddingInlineEnd:8px}
      .pf-m-clicked{background:#06c!important;color:#fff!important} ul.s-row{list-style:none;padding:0;margin:0}`,
  },
}
