// MathJax breaks a formula into lines that fit the page. Here: where it must not break, and when it has to do so anew.
(() => {
  if (!window.MathJax) return; // a page without formulas
  const MEASURE = 110; // the state of a formula before its place is measured
  const UNMEASURED = 1e6; // the width of a place that is not shown
  const RELATION = 3; // MathJax's class of =, <, ...

  // a parenthesis or bracket right after a letter or a function holds its argument
  const opensArgument = operator => {
    let child = operator, parent = child.parent;
    while (parent?.isKind('TeXAtom') && parent.childIndex(child) === 0) [child, parent] = [parent, parent.parent];
    const before = parent?.childNodes[parent.childIndex(child) - 1];
    return /^[([]$/.test(operator.getText()) && before && !before.isKind('mspace')
      && !(before.isKind('mo') && before.texClass !== 0);
  };

  // no new line between a function and its argument, before a comma, within a norm, in a short formula of the text, or
  // at the first relation of one of several statements
  const keepTogether = ({math, data}) => {
    const short = !math.display && math.math.length < 16;
    let begins = false;
    data.root.walkTree(node => {
      if (!node.isKind) return;
      if (node.isKind('mspace')) begins ||= parseFloat(node.attributes.get('width')) >= 2;
      else if (node.isKind('mtd')) begins = false;
      else if (node.isKind('mo')) {
        const first = begins && node.texClass === RELATION;
        if (first) begins = false;
        if (short || first || /^[,;‖∥]$/.test(node.getText()) || opensArgument(node))
          node.attributes.set('linebreak', 'nobreak');
      }
    });
  };
  MathJax.startup = {ready() {
    MathJax.startup.defaultReady();
    MathJax.startup.document.inputJax[0].postFilters.add(keepTogether);
  }};

  // the width changes: a phone is turned
  let width = innerWidth, timer;
  addEventListener('resize', () => {
    clearTimeout(timer);
    timer = setTimeout(async () => {
      if (Math.abs(innerWidth - width) < 40) return;
      width = innerWidth;
      await MathJax.startup.promise;
      MathJax.startup.document.rerenderPromise(MEASURE);
    }, 250);
  });
  // a fold opens: not every browser measures what is in a closed one
  document.addEventListener('toggle', async event => {
    await MathJax.startup.promise;
    const unmeasured = m => m.metrics.containerWidth === UNMEASURED && event.target.contains(m.start.node);
    if (event.target.open && [...MathJax.startup.document.math].some(unmeasured))
      MathJax.startup.document.rerenderPromise(MEASURE);
  }, true);
})();
