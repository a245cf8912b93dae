// Sphinx's search skips numbers, finds nothing where no page has every word, and ranks a page by its best word. Here
// numbers count, and pages rank by all their words, those with the most first; those with one less come after. Words
// in a page's title count more, those that Sphinx skips too ("which method"), and words in headings a little. Of a page
// the result shows the paragraph that has most of the words, not code.
document.addEventListener('DOMContentLoaded', () => {
  if (typeof Search === 'undefined') return;
  if (!new URLSearchParams(location.search).get('q'))
    document.getElementById('search-results').innerHTML =
      '<h1>Search</h1><form role="search"><input name="q" aria-label="Search" placeholder="words or numbers, then Enter" autofocus></form>';
  const parse = Search._parseQuery, pagesWith = Search.performTermsSearch;
  Search._parseQuery = query => {
    const parsed = parse(query);
    for (const number of query.match(/\d+/g) || []) { parsed[1].add(number); parsed[3].add(number); }
    return parsed;
  };
  const stem = new Stemmer(), stems = text => text.toLowerCase().match(/[\w%]+/g)?.map(o => stem.stemWord(o)) || [];
  let asked = [];
  const first = text => { // place of the first of each word that was asked for
    const places = new Map();
    for (const {0: word, index} of text.toLowerCase().matchAll(/[\w%]+/g)) {
      const o = stem.stemWord(word);
      if (asked.includes(o) && !stopwords.has(word) && !places.has(o)) places.set(o, index);
    }
    return [...places.values()];
  };
  Search.makeSearchSummary = html => {
    const page = new DOMParser().parseFromString(html, 'text/html').querySelector('[role=main]');
    page.querySelectorAll('.highlight, .headerlink, .math').forEach(o => o.remove());
    const texts = [...page.querySelectorAll('p, li, td, figcaption')].map(o => o.textContent.trim().replace(/\s+/g, ' '));
    const [most, text] = texts.reduce(([most, text], o) => first(o).length > most ? [first(o).length, o] : [most, text], [0, '']);
    const start = most ? Math.max(Math.min(...first(text)) - 80, 0) : 0;
    const summary = document.createElement('p');
    summary.className = 'context';
    summary.textContent = (start ? '…' : '') + text.slice(start, start + 240) + (start + 240 < text.length ? '…' : '');
    return summary;
  };
  const inTitles = page => {
    const about = stems(page[1]), own = Search._index.docnames.indexOf(page[0]), titles = Search._index.alltitles;
    const headings = Object.keys(titles).filter(o => titles[o].some(([doc]) => doc === own)).flatMap(stems);
    return asked.reduce((sum, o) => sum + (about.includes(o) ? 20/(about.length + asked.length) : 0) + (headings.includes(o) ? 1 : 0), 0);
  };
  const query = Search.query;
  Search.query = text => { asked = stems(text); query(text); };
  Search.performTermsSearch = (words, excluded) => {
    const found = new Map();
    for (const word of words)
      for (const page of pagesWith(new Set([word]), excluded)) {
        const known = found.get(page[0]) || {page, words: 0, score: 0};
        found.set(page[0], {page, words: known.words + 1, score: known.score + page[4]});
      }
    const most = Math.max(...[...found.values()].map(o => o.words));
    return [...found.values()].filter(o => o.words >= Math.max(most - 1, 1)).map(({page, words, score}) =>
      [...page.slice(0, 4), score + inTitles(page) - 100*(most - words), ...page.slice(5)]);
  };
});
