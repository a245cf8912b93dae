// The menu is longer than a window: it begins where the page stands in it.
document.addEventListener('DOMContentLoaded', () => {
  const menu = document.querySelector('.sidebar-scroll'), here = menu?.querySelector('.current-page');
  if (here) menu.scrollTo({behavior: 'instant',
    top: here.getBoundingClientRect().top - menu.getBoundingClientRect().top - menu.clientHeight/3});
});
