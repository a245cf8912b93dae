// Sphinx's search skips numbers, and finds nothing where no page has every word: here numbers count, and the
// pages with the most of the words are found.
document.addEventListener('DOMContentLoaded', () => {
  if (typeof Search === 'undefined') return;
  const parse = Search._parseQuery, every = Search.performTermsSearch;
  Search._parseQuery = query => {
    const parsed = parse(query);
    for (const number of query.match(/\d+/g) || []) { parsed[1].add(number); parsed[3].add(number); }
    return parsed;
  };
  Search.performTermsSearch = (words, excluded) => {
    const all = every(words, excluded);
    if (all.length || words.size < 2) return all;
    const found = new Map();
    for (const word of words)
      for (const page of every(new Set([word]), excluded)) {
        const known = found.get(page[0]) || {page, words: 0, score: 0};
        found.set(page[0], {page, words: known.words + 1, score: known.score + page[4]});
      }
    const most = Math.max(...[...found.values()].map(o => o.words));
    return [...found.values()].filter(o => o.words === most)
      .map(({page, score}) => [...page.slice(0, 4), score, ...page.slice(5)]);
  };
});
