// Stage 6: from noise back to a picture, step by step. Beside minisd/sampling.py: one loop, a rule for each sampler.
minisdLive.push(function sampling() {
  const { sqrt, log, expm1, floor } = Math;

  // --- which timesteps are visited ----------------------------------------------------------------------------------

  // `steps` of the T timesteps, evenly spaced and in falling order. See make_timesteps in sampling.py.
  function make_timesteps(steps, T, spacing) {
    const rising = {
      leading: (i) => floor((i * T) / steps) + (steps < T ? 1 : 0),
      linspace: (i) => (steps > 1 ? round((i * (T - 1)) / (steps - 1)) : T - 1),
      trailing: (i) => round(((i + 1) * T) / steps) - 1,
    }[spacing];
    return Array.from({ length: steps }, (_, i) => rising(i)).reverse();
  }

  // Python rounds a half to the even neighbour, JavaScript upwards.
  const round = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

  // The timesteps that are left if you start from a picture: the last int(strength · steps) of them (SDEdit).
  function remaining_timesteps(timesteps, strength) {
    const [steps, left] = [timesteps.length, floor(strength * timesteps.length)];
    if (!(left >= 1)) throw new Error(`At strength ${strength}, none of ${steps} steps is made: raise one of them.`);
    return timesteps.slice(-left);
  }

  // --- the loop, which all samplers share ----------------------------------------------------------------------------

  // Go through the timesteps from x_T to the picture, and yield each step. `eps_model(x, t)` returns {eps, …}.
  function* sample(name, eps_model, x_T, schedule, timesteps) {
    const { rule, set_alpha_to_one } = SAMPLERS[name];
    // The last step leads to the clean picture, ᾱ = 1, or to the lowest noise level of the training, ᾱ_0.
    const a_end = set_alpha_to_one ? 1 : schedule.alpha_bar(0);
    const [steps, past] = [timesteps.length, []];
    let x = x_T;
    for (const [i, t] of timesteps.entries()) {
      const [a_t, a_prev] = [schedule.alpha_bar(t), i + 1 < steps ? schedule.alpha_bar(timesteps[i + 1]) : a_end];
      const [x_t, answer] = [x, eps_model(x, t)];
      if (!answer.eps.every(isFinite)) throw new Error(`The model returned NaN or infinity at step ${i}, t = ${t}.`);
      const made = rule(x_t, answer.eps, a_t, a_prev, { past, i, steps });
      x = made.x;
      yield { i, t, a_t, a_prev, x_t, ...answer, ...made };
    }
  }

  // x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t                                                (DDPM, eq. 15; DDIM, eq. 9)
  const predict_x0 = (x_t, eps, a_t) => x_t.map((x, k) => (x - sqrt(1 - a_t) * eps[k]) / sqrt(a_t));

  // --- the rules: (x_t, ε, ᾱ_t, ᾱ_prev) -> x_prev, and the x̂_0 that the step aims at --------------------------------

  // Estimate x_0, then add back less of the same noise.   x_prev = √ᾱ_prev x̂_0 + √(1-ᾱ_prev) ε        (DDIM, eq. 12)
  function ddim(x_t, eps, a_t, a_prev) {
    const x0 = predict_x0(x_t, eps, a_t);
    return { x0, x: x0.map((x, k) => sqrt(a_prev) * x + sqrt(1 - a_prev) * eps[k]) };
  }

  // A straight line through the last two x̂_0, over λ = log(α/σ), with α = √ᾱ, σ = √(1-ᾱ)  (DPM-Solver++, Algorithm 2)
  function dpmpp_2m(x_t, eps, a_t, a_prev, { past, i, steps }) {
    const x0 = predict_x0(x_t, eps, a_t);
    const h = lambda(a_prev) - lambda(a_t); // the length of the step
    // First order, D = x̂_0, where extrapolation is not possible or not good: in the first step, which has only one
    // x̂_0; to the clean picture, which lies at λ = ∞; and in the last of a few long steps.
    let D = x0;
    if (past.length && a_prev < 1 && !(i === steps - 1 && steps < 15)) {
      // D = (1 + 1/2r) x̂_0 - 1/2r x̂_0^old, where r = h_old / h: the line, half a step further on
      const [x0_old, a_old] = past;
      const weight = h / (2 * (lambda(a_t) - lambda(a_old)));
      D = x0.map((x, k) => x + weight * (x - x0_old[k]));
    }
    past.splice(0, 2, x0, a_t);
    // x_prev = σ_prev / σ_t x_t - α_prev (e^(-h) - 1) D
    const [keep, add] = [sqrt((1 - a_prev) / (1 - a_t)), -sqrt(a_prev) * expm1(-h)];
    return { x0, x: x_t.map((x, k) => keep * x + add * D[k]) };
  }

  const lambda = (a) => (a < 1 ? log(a / (1 - a)) / 2 : Infinity);

  // A straight line along ε, in x̄ = x / √ᾱ = x_0 + σ ε, where ε is the slope.  x̄_prev = x̄ + (σ_prev - σ) ε
  //                                                                                                    (DDIM, eq. 13)
  function euler(x_t, eps, a_t, a_prev) {
    const [sigma, sigma_prev] = [a_t, a_prev].map((a) => sqrt((1 - a) / a));
    const x_bar = x_t.map((x) => x / sqrt(a_t));
    const follow = (to) => x_bar.map((x, k) => x + (to - sigma) * eps[k]);
    return { x0: follow(0), x: follow(sigma_prev).map((x) => sqrt(a_prev) * x) };
  }

  // by name, with the defaults that they have in sampling.py
  const SAMPLERS = {
    ddim: { rule: ddim, spacing: "leading", set_alpha_to_one: false },
    dpmpp_2m: { rule: dpmpp_2m, spacing: "trailing", set_alpha_to_one: true },
    euler: { rule: euler, spacing: "linspace", set_alpha_to_one: true },
  };

  return { make_timesteps, remaining_timesteps, sample, SAMPLERS };
});
